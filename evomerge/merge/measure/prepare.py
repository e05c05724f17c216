"""Measure everything a method asks for in one pass over the sources, and keep it on disk by who the inputs are."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from evomerge.device import use
from evomerge.files import written_aside
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.derived import threads
from evomerge.merge.measure import reductions
from evomerge.merge.measure.measurements import Kept, Measurements
from evomerge.merge.measure.reductions import Magnitudes
from evomerge.merge.measure.scan import SOURCE
from evomerge.merge.methods import METHODS

Fingerprints = Mapping[str, Mapping[str, str]]
"""SHA-256 of every file of `base` and of each source."""
PER_FILE = 1 << 22  # elements: a file of its own for every small tensor would take longer than measuring it


def measure_sources(bank: Bank, method: str, sources: Sequence[str], folder: Path, inputs: Fingerprints) -> int:
    """Measure every tensor for `method`, or take it from `folder`; how many tensors had to be measured.

    The files are named by the inputs' fingerprints, so that other inputs never meet these numbers.
    """
    wanted = METHODS[method].measures
    if not wanted:
        return 0
    common = key(method, sources, inputs)
    scan = bank.compiled.scan if bank.compiled is not None else None

    def measure(name: str) -> Kept:
        found: Kept = {}
        part = bank.taking_part(name, sources)
        measured = Measurements(bank, name, part, found, scan=scan)
        if "gram" in wanted:
            _ = measured.gram
        if "task_gram" in wanted:
            _ = measured.task_gram
        for i in range(len(part)):
            if measured.untouched(i):
                continue
            if "magnitudes" in wanted:
                measured.magnitudes(i)
            if "ranks" in wanted:
                measured.rank_weighted_l1(i)  # and with it the ranks
        bank.recent.clear()
        return found

    def together(names: Sequence[str]) -> int:
        digest = hashlib.sha256(json.dumps([common, names]).encode()).hexdigest()[:32]
        file = folder / f"{digest}.safetensors"
        if (found := load(file)) is not None:
            bank.kept.update(found)
            return 0
        save(file, {k: v for name in names for k, v in measure(name).items()})
        bank.kept.update(load(file) or {})  # what is large lies in the mapped file, not in memory
        return len(names)

    # On an accelerator one thread measures and another reads; more would hold more tensors there at a time.
    count = torch.get_num_threads() if bank.device.type == "cpu" else 2
    with threads(1), ThreadPoolExecutor(count, initializer=use, initargs=(bank.device,)) as pool:
        return sum(pool.map(together, by_file(bank)))


def by_file(bank: Bank) -> list[list[str]]:
    """The names of the tensors to measure, those together that share a file; the largest come first, so that at the
    end no thread waits for long."""
    sizes = {n: math.prod(t.shape) for n, t in bank.layout.tensors.items() if t.dtype.is_floating_point}
    files: list[list[str]] = []
    room = -1
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        if sizes[name] > room:
            files.append([])
            room = PER_FILE
        files[-1].append(name)
        room -= sizes[name]
    return files


def key(method: str, sources: Sequence[str], inputs: Fingerprints) -> str:
    """A name that changes with the inputs, the order of the sources, and the code that measures."""
    code = "".join(Path(file).read_text(encoding="utf-8") for file in (reductions.__file__, SOURCE))
    what = [sorted(METHODS[method].measures), [[s, inputs[s]] for s in ("base", *sources)], code]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def save(file: Path, kept: Kept) -> None:
    """Write measurements of one tensor; a reader sees the whole file or none."""
    tensors: dict[str, torch.Tensor] = {}
    for k, value in kept.items():
        label = json.dumps(k)
        if isinstance(value, Magnitudes):
            tensors |= {f"{label} {part}": x for part, x in value.state().items()}
        elif isinstance(value, torch.Tensor):
            tensors[label] = value.cpu().contiguous()
        else:
            tensors[label] = torch.from_numpy(np.asarray(value, dtype=np.float64).copy())
    with written_aside(file) as aside:
        save_file(tensors, aside)


def load(file: Path) -> Kept | None:
    """What `save` wrote; None if there is no such file or it is not what was written."""
    try:
        return restored(load_file(file))
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError, RecursionError):
        return None


def restored(tensors: Mapping[str, torch.Tensor]) -> Kept:
    kept: Kept = {}
    states: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for label, value in tensors.items():
        text, _, part = label.rpartition("] ")
        k = tuple(json.loads(text + "]" if part and text else label))
        if text:
            states.setdefault(k, {})[part] = value
        elif value.dtype == torch.float64:
            kept[k] = value.numpy() if value.ndim else float(value)
        else:
            kept[k] = value
    return kept | {k: Magnitudes.restored(state) for k, state in states.items()}
