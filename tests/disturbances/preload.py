"""A small library for LD_PRELOAD: a wall clock that can be set, and a death in the middle of a write to a file."""

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* EVOMERGE_TEST_CLOCK: a file of eight bytes, the seconds by which the wall clock is ahead. */
static int64_t ahead(void) {
    static volatile int64_t *shared;
    const char *name = getenv("EVOMERGE_TEST_CLOCK");
    if (!shared && name) {
        int file = open(name, O_RDONLY);
        void *found = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
        close(file);
        if (found != MAP_FAILED) shared = found;
    }
    return shared ? *shared : 0;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int code = syscall(SYS_clock_gettime, clock, time);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) time->tv_sec += ahead();
    return code;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    int code = syscall(SYS_gettimeofday, time, zone);
    if (time) time->tv_sec += ahead();
    return code;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

/* EVOMERGE_TEST_DIE: "COUNT NAME": half of the COUNT-th write to a file of this name is done, then SIGKILL comes. */
ssize_t pwrite64(int file, const void *bytes, size_t size, off_t at) {
    static long calls;
    const char *wanted = getenv("EVOMERGE_TEST_DIE");
    if (wanted) {
        char link[64], path[4096], *name;
        long count = strtol(wanted, &name, 10);
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            char *last = strrchr(path, '/');
            if (last && !strcmp(last + 1, name + 1) && ++calls == count) {
                syscall(SYS_pwrite64, file, bytes, size / 2, at);
                kill(getpid(), SIGKILL);
            }
        }
    }
    return syscall(SYS_pwrite64, file, bytes, size, at);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) { return pwrite64(file, bytes, size, at); }
"""


def preloaded(folder: Path) -> Path | None:
    """The compiled library, in a folder; None where there is no C compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    source, library = folder / "preload.c", folder / "preload.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-O1", "-w", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
