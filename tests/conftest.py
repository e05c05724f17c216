"""Real inputs that several tests share: the tiny family, trained once and kept for the next run."""

import fcntl
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from searches import import_what_commands_need

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: forked children must not share a pool
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


LONGEST = (
    "chaos", "tutorial", "kernels", "fuzz", "storage", "cma", "layer_search", "equality", "lease",
    "workers", "resume", "method_choice", "light", "search", "pareto", "learned", "scale", "guards", "face", "cli",
    "simplify", "soup", "limits", "trust", "bounds", "check", "check_faults", "play", "compare",
)  # fmt: skip
"""Files that take long; they begin first, so that both cores end at the same time.

Those after the first need no tiny family: where it is not there yet, one process trains it while the other one tests.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))  # stable: a file's own order stays


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; the test is skipped where there is none."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_family() -> Path:
    """The folder of the trained tiny family (`examples/tiny`); made in about a minute if it is not there yet."""
    out = ROOT / ".cache" / "tiny"
    out.parent.mkdir(exist_ok=True)
    with (out.parent / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        import_what_commands_need()
        child = multiprocessing.get_context("fork").Process(target=make_tiny_family, args=(out,))
        child.start()
        child.join()
        assert child.exitcode == 0, "examples/tiny/make.py failed"
    return out


def make_tiny_family(out: Path) -> None:
    """`examples/tiny/make.py OUT` in this process, which has its imports already."""
    script = ROOT / "examples" / "tiny" / "make.py"
    sys.argv = [script.name, str(out)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
