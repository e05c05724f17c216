"""Workers that die, hang, are slow or lack memory; a database server that is gone; little memory for all."""

import contextlib
import resource
import signal
import time
from collections.abc import Callable

import psutil

from disturbances.disturbed import (
    REFUSED,
    TRIALS,
    Disturbed,
    alive,
    done_before,
    finished,
    goes_on,
    injection,
    kill,
    plain,
    resumed,
    wait,
)
from disturbances.processes import suspend


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a driver."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "evomerge.search.workers.process_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def with_two(search: Disturbed) -> None:
    search.options = ("--workers", "2")
    search.changes = {"workers": {"stuck": "5s"}, "budget": {"trials": TRIALS}}


@injection("SIGKILL of the driver of two workers", alone=False)
def _(search: Disturbed) -> str:
    with_two(search)
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    workers = workers_of(started.pid)
    ended = kill(started)
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left, "workers outlive their driver"
    return resumed(search, ended, (-signal.SIGKILL,))


def to_a_worker(search: Disturbed, disturb: Callable[[psutil.Process], None], what: str) -> str:
    with_two(search)
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    workers = workers_of(started.pid)
    if workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            disturb(search.random.choice(workers))
    return goes_on(started, what)


@injection("SIGKILL of a worker", alone=False)
def _(search: Disturbed) -> str:
    return to_a_worker(search, lambda worker: worker.kill(), "its trial was given to another")


@injection("a worker that hangs", alone=False)
def _(search: Disturbed) -> str:
    return to_a_worker(search, lambda worker: worker.suspend(), "it was replaced, or not needed any more")


@injection("a slow worker", alone=False)
def _(search: Disturbed) -> str:
    def slow(worker: psutil.Process) -> None:
        for _ in range(10):
            suspend([worker], 0.2)
            time.sleep(0.05)

    what = to_a_worker(search, slow, "went on")
    assert "silent" not in search.log()
    return what


@injection("a worker out of memory", alone=False)
def _(search: Disturbed) -> str:
    def starve(worker: psutil.Process) -> None:
        size = worker.memory_info().vms
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        time.sleep(1.0)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return to_a_worker(search, starve, "a trial failed or its worker was replaced, or it had enough")


@injection("the machine of two workers suspended", alone=False)
def _(search: Disturbed) -> str:
    with_two(search)
    started = search.start()
    if not search.moment(started, in_trials=True):
        return done_before(started)
    suspend([psutil.Process(started.pid), *workers_of(started.pid)], max(search.suspended, 7.0))
    what = goes_on(started, "went on")
    assert "silent" not in search.log(), "a worker was accused of the machine's sleep"
    return what


@injection("the database server gone")
def _(search: Disturbed) -> str:
    from postgres import running_server

    with running_server() as server:
        search.changes = {"storage": server.url}
        started = search.start()
        if not search.moment(started, in_trials=True):
            what = done_before(started)
        else:
            server.kill()
            time.sleep(search.outage)
            server.start()
            what = goes_on(started, "waited, went on")
        search.trials = finished(search.run)  # the server is gone when they are compared
        return what


@injection("little address space for a worker", alone=False)
def _(search: Disturbed) -> str:
    """From a random moment of its life on, and for what replaces it nothing: its trials fail, or it dies."""

    def limit(worker: psutil.Process) -> None:
        size = int(worker.memory_info().vms * search.random.uniform(0.5, 1.0))
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    with_two(search)
    started = search.start()
    while not (found := workers_of(started.pid)) and alive(started.pid):
        time.sleep(0.01)
    time.sleep(search.random.uniform(0, 12.0))
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        limit(search.random.choice(found))
    ended = plain(wait(started), 0, REFUSED)
    if ended.returncode == 0:
        return "went on"
    assert "trials in a row" in ended.stderr, ended
    return "ten trials in a row failed; " + resumed(search, ended, (REFUSED,))


LIMITED = """
import resource
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + MORE, resource.RLIM_INFINITY))
"""


@injection("little address space from the start", alone=False)
def _(search: Disturbed) -> str:
    """A message that names memory, or enough; a native library may end the process."""
    search.prelude = LIMITED.replace("MORE", str(search.random.randrange(0, 400) << 20))
    ended = wait(search.start())
    search.prelude = ""
    what = resumed(search, ended, (0, REFUSED, -signal.SIGABRT, -signal.SIGSEGV))
    assert ended.returncode <= 0 or "memory" in ended.stderr or "new thread" in ended.stderr, ended
    return what
