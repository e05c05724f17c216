"""What differs between operating systems: locks of files, limits and memory of a process, groups of processes.

Windows lacks `fcntl` and `resource`; what stands here for them was written without a Windows machine.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

fcntl: ModuleType | None
msvcrt: ModuleType | None
resource: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None
try:
    import resource
except ImportError:
    resource = None

POSIX = fcntl is not None
LOCKED_BYTE = 1 << 30  # of a file on Windows: nobody can read a byte that is locked there, so it is none of the content
STILL_ACTIVE, QUERY = 259, 0x1000  # of Windows' GetExitCodeProcess and OpenProcess


def lock(file: BinaryIO, wait: bool = True) -> None:
    """Lock a file that is open for writing, until it is closed or the process ends.

    wait: until no other process holds the lock; else OSError if one does.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        while not lock_byte(file):
            if not wait:
                raise OSError("another process holds the lock")
            time.sleep(0.1)


def lock_byte(file: BinaryIO) -> bool:
    """Lock one byte of a file, as Windows does it; whether no other process holds it."""
    assert msvcrt is not None
    os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def flags(*names: str) -> int:
    """Those of the flags of `os.open` that this system has: O_NOFOLLOW, O_NONBLOCK, O_CLOEXEC."""
    return sum(getattr(os, name, 0) for name in names)


def user_id() -> int | None:
    """The number of the user that this process runs as; None on Windows, where files have no owners by number."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def limit_of_a_file() -> int | None:
    """The most bytes that this process may write into a file (ulimit -f); None without a limit."""
    if resource is None:
        return None
    limit: int = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def peak_memory() -> int:
    """The most bytes of memory that this process has used; 0 where the system does not say."""
    try:  # ru_maxrss would include the process from which this one was started
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    if resource is None:
        return 0
    used: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024)


def physical_memory() -> int:
    """The machine's bytes of memory."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # MEMORYSTATUSEX: its own length and a percentage, both of 4 bytes, then seven sizes of 8 bytes.
    status = (ctypes.c_uint64 * 8)(64)
    kernel32().GlobalMemoryStatusEx(status)
    return int(status[1])


def process_exists(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    if not POSIX:
        process, code = kernel32().OpenProcess(QUERY, False, pid), ctypes.c_ulong()
        if not process:
            return False
        kernel32().GetExitCodeProcess(process, ctypes.byref(code))
        kernel32().CloseHandle(process)
        return code.value == STILL_ACTIVE
    try:
        os.kill(pid, 0)  # on Windows this would be Ctrl-C
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def kill_process_group(leader: int) -> None:
    """Kill the process that leads a process group, and its children.  leader: its process id."""
    if POSIX:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(leader)], capture_output=True)


def kill_own_group() -> None:
    """Kill this process and its children, if it leads a process group."""
    if not POSIX or os.getpgrp() == os.getpid():
        kill_process_group(os.getpid())


def kernel32() -> Any:
    """Functions of Windows."""
    return ctypes.windll.kernel32  # type: ignore[attr-defined]
