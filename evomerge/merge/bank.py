"""The bank: base and sources where they fit, and what was measured of them, tensor by tensor."""

import os
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.merge.call import Keys
from evomerge.merge.compiled import Compiled
from evomerge.merge.derived import derive, fingerprint, kept
from evomerge.merge.execute import random_mask
from evomerge.merge.gathered import Gathered, open_gathered
from evomerge.merge.layout import BASE, Slice, build_layout
from evomerge.merge.measure import Kept, Measurements
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Chance, Derived
from evomerge.merge.recipe import Recipe
from evomerge.sources.checkpoint import is_head
from evomerge.sources.open import Models

HELD_BYTES = 4 << 30  # computed tensors (adapters, nested recipes) kept in memory; the others are computed when needed


class Bank:
    """Tensors of the base and the sources by the names of what they are merged into, on one device.

    layout: what is merged into what; with `slices`, other layers than the namesakes.

    On the CPU checkpoints stay memory-mapped: the page cache is the bank.  On an accelerator a tensor is copied
    there on first use and stays while `capacity` bytes last, and so does what is computed (an adapter's sum with the
    base, a nested recipe's result); the others wait in pinned host memory and are copied while the tensor before them
    is merged.
    """

    def __init__(
        self,
        models: Models,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        compiled: Compiled | None = None,
        slices: Sequence[Slice] = (),
        cache: Path | None = None,
    ) -> None:
        """cache: a folder for what takes long to make of the sources; without it that is kept in memory."""
        self.models = models
        self.slices = list(slices)
        self.layout = build_layout(models, slices)
        self.compiled = compiled
        self.device = torch.device(device)
        self.launcher = compiled.launcher if compiled is not None and self.device.type == "cuda" else None
        self.names = list(self.layout.tensors)
        self.layers = self.layout.layers
        self.capacity = capacity if capacity is not None else default_capacity(self.device)
        self.held: dict[tuple[str, str], torch.Tensor] = {}
        self.recent: dict[tuple[str, str], torch.Tensor] = {}
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.pinned: dict[tuple[str, str], Tensor] = {}
        self.coming: dict[tuple[str, str], tuple[Tensor, torch.Event]] = {}
        self.kept: Kept = {}
        self.cache = cache
        self.made: dict[tuple[str, ...], list[Tensor]] = {}
        self.files: dict[tuple[str, str], Gathered] = {}

    def merged_as(self, name: str) -> str:
        """The tensor that is merged for `name`: the embedding for a copy of it that the base stores as its head."""
        base = self.models.base
        return base.embedding_name or name if is_head(name) and base.ties_head else name

    def base(self, name: str) -> torch.Tensor:
        """The base's tensor; where it takes no part, the first source's, to give the shape."""
        origin = self.layout.origin(BASE, name)
        if origin is None:
            return self.source(next(iter(self.layout.origins[name])), name)
        return self.fetch("", origin)

    def source(self, source: str, name: str) -> torch.Tensor:
        """A source's tensor; the base's own object if an adapter does not touch it."""
        origin = self.layout.origin(source, name)
        assert origin is not None, f"{source} has no part in {name}"
        model = self.models.sources[source]
        if not model.touches(origin):
            return self.fetch("", origin)
        return self.fetch(source, origin)

    def taking_part(self, name: str, sources: Sequence[str]) -> list[str]:
        """Those of the sources that the tensor `name` is made of."""
        return [s for s in sources if self.layout.origin(s, name) is not None]

    def fetch(self, source: str, name: str) -> torch.Tensor:
        """A model's own tensor `name`, the base's if `source` is empty."""
        for store in (self.held, self.recent):
            if (source, name) in store:
                return store[source, name]
        model = self.models.sources[source] if source else self.models.base
        tensor = self.arrived(source, name)
        is_mapped = self.device.type == "cpu" and model.stores(name)
        if is_mapped or tensor.nbytes <= self.capacity:
            self.capacity -= 0 if is_mapped else tensor.nbytes
            self.held[source, name] = tensor
        else:
            self.recent[source, name] = tensor
        return tensor

    def prefetch(self, name: str, sources: Sequence[str]) -> None:
        """Begin to copy what an output tensor is made of to the accelerator while another is merged."""
        if self.copies is None:
            return
        wanted = [("", self.layout.origin(BASE, name)), *((s, self.layout.origin(s, name)) for s in sources)]
        for source, origin in wanted:
            key = (source, origin or "")
            if origin is None or key in self.held or key in self.coming:
                continue
            if source and not self.models.sources[source].touches(origin):
                continue
            host = self.in_pinned_memory(source, origin)
            with torch.cuda.stream(self.copies):
                self.coming[key] = host.to(self.device, non_blocking=True), self.copies.record_event()

    def in_pinned_memory(self, source: str, name: str) -> Tensor:
        """A model's tensor where the accelerator can read it by itself; it stays there while half the memory lasts."""
        if (source, name) not in self.pinned:
            model = self.models.sources[source] if source else self.models.base
            host = model.read(name).contiguous().pin_memory()
            if sum(t.nbytes for t in self.pinned.values()) + host.nbytes > host_memory() // 2:
                return host
            self.pinned[source, name] = host
        return self.pinned[source, name]

    def arrived(self, source: str, name: str) -> Tensor:
        """A model's tensor on the device, copied now if it was not on its way."""
        if (source, name) not in self.coming:
            model = self.models.sources[source] if source else self.models.base
            return model.read(name).to(self.device)
        tensor, event = self.coming.pop((source, name))
        here = torch.cuda.current_stream(self.device)
        here.wait_event(event)
        tensor.record_stream(here)
        return tensor

    def forget_recent(self) -> None:
        """Let go of what did not fit: it stays only while one tensor is merged."""
        self.recent.clear()

    def gathered(self, recipe: Recipe, names: Sequence[str] | None = None) -> list[Gathered]:
        """The statistics of the sources (or those in `names`), opened and checked once; [] if the method uses none.

        EvomergeError if a file does not fit its source, or two do not speak of the same tensors.
        """
        kind = METHODS[recipe.method].statistics
        if kind is None:
            return []
        found = []
        for source in recipe.sources:
            if names is not None and source.name not in names:
                continue
            assert source.statistics is not None, "the recipe was not checked"
            key = (source.statistics, source.name)
            if key not in self.files:
                self.files[key] = open_gathered(Path(source.statistics), kind, source.name, self.models)
            found.append(self.files[key])
        for other in found[1:]:
            if differing := sorted(other.names ^ found[0].names):
                raise EvomergeError(f"{other.path} and {found[0].path}: only one of them has {differing[0]}")
        return found

    def derived(self, plan: Derived, name: str, sources: Sequence[str], gathered: Sequence[Gathered]) -> list[Tensor]:
        """The D_j of a plan.  What does not depend on settings is made once: in the cache folder, or in memory as
        long as there is room."""
        operands = [self.base(name), *(self.source(s, name) for s in sources)]
        if plan.settings:
            return [d.to(self.device) for d in derive(plan, name, operands[0], operands[1:], gathered)]
        key = (plan.kind, name, *sources)
        if key in self.made:
            return self.made[key]
        if self.cache is not None:
            digest = fingerprint(plan.kind, operands)
            made = kept(self.cache / "derived", digest, lambda: derive(plan, name, operands[0], operands[1:]))
        else:
            made = derive(plan, name, operands[0], operands[1:])
        made = [d.to(self.device) for d in made]
        is_mapped = self.cache is not None and self.device.type == "cpu"
        size = 0 if is_mapped else sum(d.nbytes for d in made)
        if size <= self.capacity:
            self.capacity -= size
            self.made[key] = made
        return made

    def measurements(
        self, name: str, sources: Sequence[str], seed: int = 0, gathered: Sequence[Gathered] = ()
    ) -> Measurements:
        """What planners may ask about a tensor; whatever was measured before is not measured again."""

        def mask(source: int, chance: Chance, part: slice) -> torch.Tensor:
            words = mask_keys(seed, name, sources)
            levels = measured.levels(source).reshape(-1)[part] if chance.step else None
            found = random_mask(chance, part.start, part.stop - part.start, (words[0], words[1][source]), levels)
            return found.to(self.device)

        scan = self.compiled.scan if self.compiled is not None else None
        measured = Measurements(self, name, sources, self.kept, mask, gathered, scan)
        return measured


def default_capacity(device: torch.device) -> int:
    """Bytes the bank may hold: on an accelerator, what is free less a fifth for activations."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.8)
    return HELD_BYTES


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@lru_cache(maxsize=65536)
def mask_key(seed: int, tensor: str, source: str = "") -> int:
    """The 64-bit word that names the random masks of a tensor, or of one source's, under one seed."""
    return int.from_bytes(blake2b(f"{seed}\0{tensor}\0{source}".encode(), digest_size=8).digest(), "little")


def mask_keys(seed: int, tensor: str, sources: Sequence[str]) -> Keys:
    """The words of a tensor's masks: its own, and each source's."""
    return mask_key(seed, tensor), [mask_key(seed, tensor, s) for s in sources]
