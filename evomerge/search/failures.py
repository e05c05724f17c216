"""When too many trials fail one after the other: the search stops and says why they failed."""

from itertools import takewhile

from optuna.trial import FrozenTrial, TrialState

from evomerge.errors import EvomergeError
from evomerge.search.storage.study import SearchStudy, record_of

FAILURES_IN_A_ROW = 10


def stop_after_failures(study: SearchStudy) -> None:
    """Raise EvomergeError with the reasons if the trial just finished is the tenth in a row to fail.

    The count is that of the study, so a resume goes on counting; after a full row a resume gets another ten.
    """
    count = sum(1 for _ in takewhile(failed, reversed(study.finished)))
    if count and count % FAILURES_IN_A_ROW == 0:
        raise EvomergeError(explain_failures(study))


def failed(trial: FrozenTrial) -> bool:
    """Whether a finished trial has no usable scores: an error, or a broken candidate."""
    return trial.state == TrialState.FAIL or "broken" in record_of(trial)


def explain_failures(study: SearchStudy) -> str:
    """The reasons of the last failures, counted."""
    last = [record_of(t) for t in study.finished if failed(t)][-FAILURES_IN_A_ROW:]
    reasons = [str(r.get("reason") or r.get("broken") or "unknown") for r in last]
    counted = sorted({r: reasons.count(r) for r in reasons}.items(), key=lambda x: -x[1])
    lines = "\n  ".join(f"{count} x {text}" for text, count in counted)
    return (
        f"{FAILURES_IN_A_ROW} trials failed in a row, so the search has stopped; the reasons:\n  {lines}\n"
        "Tracebacks are in the run's log.txt. After mending the cause, go on with `evomerge resume`"
    )
