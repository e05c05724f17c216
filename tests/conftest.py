"""Real inputs that several tests share: the tiny family, trained once and kept for the next run."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked children must not share a pool
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


LONGEST = ("chaos", "workers", "kernels", "resume", "search", "soup", "fuzz", "limits", "cma", "storage", "equality")
"""Files by how long they take; they begin first, so that both cores end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))  # stable: a file's own order stays


@pytest.fixture(scope="session")
def tiny_family() -> Path:
    """The folder of the trained tiny family (`examples/tiny`); made in about a minute if it is not there yet."""
    out = ROOT / ".cache" / "tiny"
    out.parent.mkdir(exist_ok=True)
    with (out.parent / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "make.py", out], check=True)
    return out
