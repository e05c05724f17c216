"""Measure everything that a method asks for in one pass before a search; keep it on disk by the inputs' SHA-256."""

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
from evomerge.files.write import written_aside
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.derived import threads
from evomerge.merge.measure import gram, magnitudes, ranks, sums
from evomerge.merge.measure.magnitudes import Magnitudes
from evomerge.merge.measure.measurements import MeasurementCache, Measurements
from evomerge.merge.measure.scan import SOURCE
from evomerge.merge.methods import METHODS

Fingerprints = Mapping[str, Mapping[str, str]]
"""`base` or a source -> file -> its SHA-256."""
PER_FILE = 1 << 22  # elements of tensors that share a file: a file for each small tensor takes longer than measuring it


def measure_sources(bank: Bank, method: str, sources: Sequence[str], folder: Path, inputs: Fingerprints) -> int:
    """Measure every tensor for `method`, or read the measurements from `folder`.

    inputs: the SHA-256 of all inputs.  They are part of the files' names, so that numbers of other inputs are never
        read.

    Returns how many tensors had to be measured.
    """
    wanted = METHODS[method].measures
    if not wanted:
        return 0
    common = key(method, sources, inputs)
    scan = bank.compiled.scan if bank.compiled is not None else None

    def measure(name: str) -> MeasurementCache:
        found: MeasurementCache = {}
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
        bank.device_cache.in_use.clear()
        return found

    def together(names: Sequence[str]) -> int:
        digest = hashlib.sha256(json.dumps([common, names]).encode()).hexdigest()[:32]
        file = folder / f"{digest}.safetensors"
        if (found := load(file)) is not None:
            bank.measurement_cache.update(found)
            return 0
        save(file, {k: v for name in names for k, v in measure(name).items()})
        bank.measurement_cache.update(load(file) or {})  # large ones then lie in the mapped file, not in memory
        return len(names)

    # On an accelerator one thread measures while another reads; more threads would hold more tensors there at a time.
    count = torch.get_num_threads() if bank.device.type == "cpu" else 2
    with threads(1), ThreadPoolExecutor(count, initializer=use, initargs=(bank.device,)) as pool:
        return sum(pool.map(together, by_file(bank)))


def by_file(bank: Bank) -> list[list[str]]:
    """The tensors to measure: for each file the names that share it.

    The largest come first, so that at the end no thread waits for long.
    """
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
    files = (sums.__file__, gram.__file__, magnitudes.__file__, ranks.__file__, SOURCE)
    code = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    what = [sorted(METHODS[method].measures), [[s, inputs[s]] for s in ("base", *sources)], code]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def save(file: Path, measured: MeasurementCache) -> None:
    """Write measurements; a reader sees the complete file or none."""
    tensors: dict[str, torch.Tensor] = {}
    for k, value in measured.items():
        label = json.dumps(k)
        if isinstance(value, Magnitudes):
            tensors |= {f"{label} {part}": x for part, x in value.state().items()}
        elif isinstance(value, torch.Tensor):
            tensors[label] = value.cpu().contiguous()
        else:
            tensors[label] = torch.from_numpy(np.asarray(value, dtype=np.float64).copy())
    with written_aside(file) as aside:
        save_file(tensors, aside)


def load(file: Path) -> MeasurementCache | None:
    """The measurements of a file of `save`; None if there is none or it is damaged."""
    try:
        return restored(load_file(file))
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError, RecursionError):
        return None


def restored(tensors: Mapping[str, torch.Tensor]) -> MeasurementCache:
    """The measurements from the tensors of a file.

    A tensor's name is the key as JSON; for each part of a `Magnitudes`, a space and the part's name follow.
    """
    found: MeasurementCache = {}
    states: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for label, value in tensors.items():
        text, _, part = label.rpartition("] ")
        k = tuple(json.loads(text + "]" if part and text else label))
        if text:
            states.setdefault(k, {})[part] = value
        elif value.dtype == torch.float64:
            found[k] = value.numpy() if value.ndim else float(value)
        else:
            found[k] = value
    return found | {k: Magnitudes.restored(state) for k, state in states.items()}
