"""Models as large as the device: base and four sources in bfloat16, beside a live model."""

import shutil
from functools import partial
from pathlib import Path

import torch
from merge import write_models
from stopwatch import timed

from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import materialise
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.open_models import open_models
from gpu_steps.bench import Bench
from gpu_steps.models import outputs

SOURCES = ["one", "two", "three", "four"]
KNOBS = {"task_arithmetic": {}, "ties": {"density": 0.5}}


def large(bench: Bench) -> None:
    """1.5B, then 7B: as much held as fits, and nothing held."""
    copy, host = rates(bench)
    for size in ["tiny"] if bench.small else ["1.5b", "7b whole"]:
        folder = bench.work / "large"
        with bench.guarded(f"{size}: writing"):
            folders = write_models(folder, size, SOURCES, str(bench.device), linked=True)
            for mode, capacity in {"held": None, "streamed": 0}.items():
                with bench.guarded(f"{size}, {mode}"):
                    merged(bench, f"{size}, {mode}", folders, capacity, copy if capacity is None else host)
        shutil.rmtree(folder, ignore_errors=True)


def rates(bench: Bench) -> tuple[float, float]:
    """Bytes a second: read and written on the device, and from pinned memory to it."""
    size = 1 << (20 if bench.small else 30)
    there = torch.ones(size, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(there)
    host = torch.ones(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    copy = bench.rate(lambda: other.copy_(there), 2 * size)
    return copy, bench.rate(lambda: other.copy_(host, non_blocking=True), size)


def merged(bench: Bench, title: str, folders: dict[str, Path], capacity: int | None, rate: float) -> None:
    """Candidates of two methods.  rate: at which the bytes of a candidate could move at best."""
    names = [n for n in folders if n != "base"]
    models = open_models(folders["base"], {n: folders[n] for n in names})
    bench.reset_peak()
    bank = Bank(models, bench.device, capacity, bench.compiled(), live=torch.bfloat16, mapped=False)
    out = outputs(bank, torch.bfloat16)
    own = sum(x.nbytes for x in out.values())
    needed = (len(names) + 1) * own
    for method, knobs in KNOBS.items():
        seconds = []
        for k in range(3):
            sources = [RecipeSource(name=n, path=str(folders[n])) for n in names]
            made = Recipe(
                method=method,
                base=Model(path=str(folders["base"])),
                sources=sources,
                parameters={"weight": 0.4 + 0.01 * k, **knobs},
            )
            seconds.append(timed(partial(materialise, made, bank, out), bench.device))
        moved = needed if capacity == 0 else needed + own
        floor = moved / rate
        text = f"first {seconds[0]:.3f}, then {min(seconds[1:]):.4f}; {min(seconds[1:]) / floor:.2f} times the floor"
        bench.report(f"{title}, {method}: a candidate", text, "s", ok=True)
    held = sum(x.nbytes for x in bank.tensors.held.values())
    bench.report(f"{title}: held of what is merged", f"{held / 1e9:.2f} of {needed / 1e9:.2f}", "GB")
    if bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        text = f"{bench.peak() / 1e9:.1f} of {total / 1e9:.1f}"
        bench.report(f"{title}: memory at most", text, "GB", ok=bench.peak() < 0.9 * total)
