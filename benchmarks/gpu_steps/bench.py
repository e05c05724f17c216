"""What a step is given, and where its results go."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.kernels.compiler import user_cache


@dataclass(frozen=True)
class Bench:
    """device: that is measured.  small: a dry run with the least sizes.  work: a folder for models and runs.

    results: gets a line of JSON for each result as soon as it is known.  family: the tiny family's folder, which may
    still be being made.
    """

    device: torch.device
    small: bool
    work: Path
    results: Path
    family: Path

    def report(self, name: str, value: object = None, unit: str = "", ok: bool | None = None) -> None:
        """One result.  ok: whether it is right, where that can be told."""
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        row = {"name": name, "value": value, "unit": unit, "ok": ok}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(
            f"  {name}: {'' if value is None else value} {unit} {'' if ok is None else 'ok' if ok else 'WRONG'}",
            flush=True,
        )

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """A failure in this block is its result, and the step goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report(name, f"{type(error).__name__}: {str(error)[:300]}", ok=False)

    def compiled(self) -> Compiled | None:
        """The fused kernels; a dry run does without, they take longer to compile than it may last."""
        return None if self.small else Compiled(user_cache("kernels"), lambda line: print(f"  {line}", flush=True))

    def wait_for_family(self) -> Path:
        """The tiny family's folder, whole."""
        while not (self.family / "manifest.json").exists():
            time.sleep(0.5)
        return self.family

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes of the device's memory at most since the last reset; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def rate(self, call: Callable[[], Any], amount: float, repeats: int = 5) -> float:
        """`amount` a second, by the best of some calls after one that warms up."""
        from stopwatch import timed

        timed(call, self.device)
        return amount / min(timed(call, self.device) for _ in range(repeats))
