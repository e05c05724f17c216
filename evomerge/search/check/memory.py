"""Whether the memory suffices for a search: said before the live model is loaded, which might end the process."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES, resolve_device
from evomerge.merge.bank.memory import host_memory
from evomerge.search.check.concerns import Concern
from evomerge.search.models import model_folders, shapes_of
from evomerge.sources.open_models import Models

FORWARDS = 1.15  # of the live model: with activations, keys and values, logits


@dataclass(frozen=True)
class Memory:
    """Bytes that a search needs, and that there are.

    live: of the live models of all workers with what forwards take.
    files: of base and sources on the disk, which should stay in memory beside them.
    free: on the device that computes.
    device: its kind, `cpu` or `cuda`.
    """

    live: int
    files: int
    free: int
    device: str


def measure_memory(config: SearchConfig, models: Models, workers: int = 1) -> Memory:
    """What a search needs before anything of it is loaded.

    workers: how many of them share the device.
    """
    device = resolve_device(config.device)
    held = config.dtype if config.compute_dtype == "auto" else config.compute_dtype
    size = sum(map(math.prod, shapes_of(models))) * TORCH_DTYPES[held].itemsize
    files = sum(f.stat().st_size for folder in model_folders(config).values() for f in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()
    return Memory(int(FORWARDS * size * workers), files, free, device.type)


def free_host_memory() -> int:
    """Bytes that this process can still use, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        found = []
    return min([host_memory(), *found])


def memory_concerns(memory: Memory) -> Iterator[Concern]:
    """That the live model, or base and sources beside it, do not fit."""
    live, files, free = (f"{size / 1e9:.1f} GB" for size in (memory.live, memory.files, memory.free))
    where = "this machine" if memory.device == "cpu" else "the accelerator"
    if memory.live > memory.free:
        what = f"the model that is scored needs {live} of memory, {free} are free on {where}"
        yield Concern(what, "give `dtype: bfloat16`, fewer workers, or another device")
    elif memory.live + memory.files > memory.free and memory.device == "cpu":
        what = f"base and sources ({files}) do not fit into the free memory ({free}) beside the model that is scored"
        mend = "every merge will read them from the disk: take LoRA adapters instead of whole models, or leave one out"
        yield Concern(what, mend)
