"""The bank: base and sources where they fit, and what was measured of them, tensor by tensor."""

from functools import lru_cache
from hashlib import blake2b

import torch

from evomerge.merge.plan import Gram
from evomerge.merge.statistics import Magnitudes, gram_matrix
from evomerge.sources.adapter import Adapter
from evomerge.sources.anatomy import layer_count
from evomerge.sources.open import Models

HELD_BYTES = 4 << 30  # adapter deltas kept in memory at most; beyond it they are computed again when needed


class Bank:
    """Tensors of the base and the sources by name, on one device.

    On the CPU checkpoints stay memory-mapped: the page cache is the bank.  On an accelerator a tensor is copied
    there on first use and stays while `capacity` bytes last, and so does an adapter's sum with the base.
    """

    def __init__(self, models: Models, device: torch.device | str = "cpu", capacity: int | None = None) -> None:
        self.models = models
        self.device = torch.device(device)
        self.names = list(models.base.tensors)
        self.layers = layer_count(self.names)
        self.capacity = capacity if capacity is not None else default_capacity(self.device)
        self.held: dict[tuple[str, str], torch.Tensor] = {}
        self.histograms: dict[tuple[str, str], Magnitudes] = {}
        self.grams: dict[tuple[str, ...], Gram] = {}
        self.thresholds: dict[tuple[str, str, float], float] = {}

    def base(self, name: str) -> torch.Tensor:
        return self.fetch("", name)

    def source(self, source: str, name: str) -> torch.Tensor:
        """A source's tensor; the base's own object if an adapter does not touch it."""
        model = self.models.sources[source]
        if isinstance(model, Adapter) and not model.touches(name):
            return self.base(name)
        return self.fetch(source, name)

    def fetch(self, source: str, name: str) -> torch.Tensor:
        if (source, name) in self.held:
            return self.held[source, name]
        model = self.models.sources[source] if source else self.models.base
        tensor = model.read(name).to(self.device)
        is_mapped = self.device.type == "cpu" and not isinstance(model, Adapter)
        if is_mapped or tensor.nbytes <= self.capacity:
            self.capacity -= 0 if is_mapped else tensor.nbytes
            self.held[source, name] = tensor
        return tensor

    def gram(self, name: str, sources: list[str]) -> Gram:
        """Dot products of base and sources, (1 + N, 1 + N), computed once."""
        key = (name, *sources)
        if key not in self.grams:
            self.grams[key] = gram_matrix([self.base(name), *(self.source(s, name) for s in sources)])
        return self.grams[key]

    def threshold(self, source: str, name: str, density: float) -> float:
        """The least magnitude that a trim of this task vector at `density` keeps."""
        key = (source, name, density)
        if key not in self.thresholds:
            if (source, name) not in self.histograms:
                self.histograms[source, name] = Magnitudes(self.source(source, name), self.base(name))
            self.thresholds[key] = self.histograms[source, name].threshold(density)
        return self.thresholds[key]


def default_capacity(device: torch.device) -> int:
    """Bytes the bank may hold: on an accelerator, what is free less a fifth for activations."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.8)
    return HELD_BYTES


@lru_cache(maxsize=65536)
def mask_key(seed: int, tensor: str, source: str) -> tuple[int, int]:
    """Two 32-bit words that name the random mask of one source's tensor under one seed."""
    digest = blake2b(f"{seed}\0{tensor}\0{source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
