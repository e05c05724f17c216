"""Clocks that are set while a search runs."""

import struct
import time
from pathlib import Path

from disturbances.disturbed import Disturbed, done_before, goes_on, injection, start_in_new_process
from disturbances.preload import preloaded

DAY = 86400
CLOCK = """
import os, time
real = time.time
time.time = lambda: real() - (36000 if os.path.exists(FLAG) else 0)
"""


@injection("the clock set back by ten hours", quick=True)
def _(search: Disturbed) -> str:
    search.prelude = CLOCK.replace("FLAG", repr(str(search.folder / "flag")))
    started = search.start()
    if not search.moment(started):
        return done_before(started)
    (search.folder / "flag").touch()
    return goes_on(started, "went on")


@injection("the clock a day forward, then two days back")
def _(search: Disturbed) -> str:
    """The clock of all libraries of the process, while a limit of an hour counts; the monotonic clock goes on."""
    offset = search.folder / "offset"
    set_clock(offset, 0)
    search.options = ("--trials", "16", "--timeout", "1h")
    library = preloaded(search.folder)
    if library is None:
        return "not tried: there is no C compiler"
    environment = {"LD_PRELOAD": str(library), "EVOMERGE_TEST_CLOCK": str(offset)}
    started = start_in_new_process(*search.command, environment=environment)
    search.options = ()
    if not search.moment(started):
        return done_before(started)
    today, lines = time.strftime("%Y-%m-%d"), len(search.log().splitlines())
    set_clock(offset, DAY)
    time.sleep(search.random.uniform(0, 3.0))
    set_clock(offset, -DAY)
    what = goes_on(started, "went on")
    later = search.log().splitlines()[lines + 1 :]
    assert not later or any(line[:10] != today for line in later), "the clock was not set"
    return what


def set_clock(file: Path, seconds: int) -> None:
    """Write how many seconds the wall clock is ahead, without a moment at which the file is empty."""
    with file.open("r+b" if file.exists() else "w+b") as out:
        out.write(struct.pack("<q", seconds))
