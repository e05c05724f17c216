"""The command that follows from a verdict."""

import math

from evomerge.config.schema import SearchConfig
from evomerge.search.verdict.verdict import Outcome

LEAST_TRIALS = 100  # of a search that goes on


def next_step(outcome: Outcome, config: SearchConfig, trials: int) -> str:
    """The next command: export what is recommended, or go on with a search that has decided nothing.

    trials: how many have finished.  In the command, RUN stands for the run folder.
    """
    if outcome in ("better", "worse"):
        return "evomerge export RUN --out merged/"
    if config.budget.trials is None and config.budget.timeout is not None:
        return f"evomerge resume RUN --timeout {math.ceil(2 * config.budget.timeout / 60)}m"
    return f"evomerge resume RUN --trials {max(LEAST_TRIALS, 2 * trials)}"
