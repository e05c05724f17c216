"""Files of a run or of its models that are damaged or replaced while a search runs, and models that are broken."""

import os
import shutil
import signal

from disturbances.disturbed import REFUSED, Disturbed, done_before, goes_on, injection, kill, plain, resumed, wait
from disturbances.processes import TIES


@injection("a truncated study file", quick=True)
def _(search: Disturbed) -> str:
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    ended = kill(started)
    kept = search.folder / "kept"
    shutil.copytree(search.run, kept)
    for file in search.run.glob("study.db-*"):
        file.unlink()
    file = search.run / "study.db"
    os.truncate(file, search.random.randrange(1, file.stat().st_size))
    refused = search.resume()
    plain(refused, REFUSED)
    for part in kept.glob("study.db*"):
        shutil.copy(part, search.run / part.name)
    return "refused; " + resumed(search, ended, (-signal.SIGKILL,))


def truncated_cache(search: Disturbed, pattern: str) -> str:
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    ended = kill(started)
    files = list((search.run / "cache").glob(pattern))
    assert files, f"there is nothing to truncate under {pattern}"
    for file in files:
        os.truncate(file, search.random.randrange(file.stat().st_size))
    return resumed(search, ended, (-signal.SIGKILL,))


@injection("truncated items")
def _(search: Disturbed) -> str:
    return truncated_cache(search, "items/*.jsonl")


@injection("truncated measurements of the sources")
def _(search: Disturbed) -> str:
    search.changes = dict(TIES)
    return truncated_cache(search, "*.safetensors")


@injection("a source replaced")
def _(search: Disturbed) -> str:
    own = search.folder / "family"
    shutil.copytree(search.family, own)
    search.family = own
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    source = own / "add" / "model.safetensors"
    kept = source.with_suffix(".kept")
    if search.random.random() < 0.5:  # renamed into its place, or written over
        shutil.copy(source, kept)
        shutil.copy(own / "rev" / "model.safetensors", source)
    else:
        source.rename(kept)
        shutil.copy(own / "rev" / "model.safetensors", source)
    ended = wait(started)
    assert "changed while the search runs" in ended.stderr or ended.returncode in (-signal.SIGBUS, 0), ended
    refused = search.resume()
    assert refused.returncode == 2, refused
    assert "is another file now" in refused.stderr, refused.stderr
    kept.replace(source)
    return "stopped, refused; " + resumed(search, ended, (2, -signal.SIGBUS, 0))


BREAK = """
import os
import evomerge.search.evaluation.evaluator as s
real = s.Evaluator.materialise
def broken(self, recipe, clock):
    real(self, recipe, clock)
    if os.path.exists(FLAG):
        os.unlink(FLAG)
        next(self.model.parameters()).data.fill_(float("nan"))
s.Evaluator.materialise = broken
"""


@injection("scores that are NaN", alone=False)
def _(search: Disturbed) -> str:
    flag = search.folder / "flag"
    search.prelude = BREAK.replace("FLAG", repr(str(flag)))
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    flag.touch()
    what = goes_on(started, "one trial broken, went on")
    assert flag.exists() or "broken" in search.log()
    return what
