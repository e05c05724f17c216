"""When too many trials fail one after the other, there is a cause to be mended, and the search says which."""

from optuna.trial import FrozenTrial, TrialState

from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.trial_record import record_of

FAILURES_IN_A_ROW = 10


def failures_in_a_row(study: SearchStudy) -> int:
    """How many of the last finished trials failed, so that a resume goes on counting; a full row starts anew."""
    count = 0
    for trial in reversed(study.finished):
        if not failed(trial):
            break
        count += 1
    return count % FAILURES_IN_A_ROW


def failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL or record_of(trial).broken is not None


def explain_failures(study: SearchStudy) -> str:
    """The reasons of the last failures, counted."""
    last = [record_of(t) for t in study.finished if failed(t)][-FAILURES_IN_A_ROW:]
    reasons = [r.failure or "unknown" for r in last]
    counted = sorted({r: reasons.count(r) for r in reasons}.items(), key=lambda x: -x[1])
    lines = "\n  ".join(f"{count} x {text}" for text, count in counted)
    return (
        f"{FAILURES_IN_A_ROW} trials failed in a row, so the search has stopped; the reasons:\n  {lines}\n"
        "Tracebacks are in the run's log.txt. After mending the cause, go on with `evomerge resume`"
    )
