"""Whether the time of a search is enough to search at all, in words."""

import math

from evomerge.search.check.concerns import duration
from evomerge.search.verdict.verdict import ENOUGH_SEARCHED


def room(left: float, reserve: float, trial: float, workers: int, baselines: int) -> int:
    """How many candidates can be tried until the last trial must begin.

    left: seconds until the result must exist.
    reserve: how many of them are for judging.
    trial: seconds of a trial.
    workers: how many trials run at once.
    baselines: how many trials of baselines come first.
    """
    return max(0, math.floor((left - reserve) / trial * workers) - baselines)


def too_short(
    left: float, reserve: float, trial: float, workers: int, baselines: int, proposed: int, elapsed: float
) -> str | None:
    """What to say if the time leaves room for hardly a search (ENOUGH_SEARCHED), and what would be enough; else None.

    proposed: how many candidates have been tried already.  elapsed: seconds of the run so far.
    The other arguments are those of `room`.
    """
    count = proposed + room(left, reserve, trial, workers, baselines)
    if count >= ENOUGH_SEARCHED:
        return None
    enough = elapsed + reserve + (baselines + ENOUGH_SEARCHED - proposed) * trial / workers
    late = f"; judging alone takes about {duration(reserve)}, so the result comes late" if reserve > left else ""
    tried = "no candidate" if not count else f"about {count} candidates" if count > 1 else "about one candidate"
    return (
        f"the time limit leaves room for {tried}, and fewer than {ENOUGH_SEARCHED} are hardly a search; "
        f"--timeout {duration(enough)} would be enough for {ENOUGH_SEARCHED}{late}"
    )
