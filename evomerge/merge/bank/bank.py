"""The bank: it reads tensors of the base and the sources onto a device, and keeps what fits there."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from evomerge.device import merging_device
from evomerge.merge.bank.derived_tensors import DerivedTensors
from evomerge.merge.bank.device_cache import DeviceCache, Key
from evomerge.merge.bank.memory import Room, Share, default_capacity, host_memory, pinned_capacity
from evomerge.merge.bank.model_tensors import ModelTensors
from evomerge.merge.bank.prefetch import Prefetch
from evomerge.merge.bank.statistics_files import StatisticsFiles
from evomerge.merge.bank.tensor_inputs import TensorInputs
from evomerge.merge.bank.transfer import Transfers
from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.kernels.random_masks import mask_keys, random_mask
from evomerge.merge.measure.measurements import MeasurementCache, Measurements
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import Chance, Derived
from evomerge.merge.recipe.layout import build_layout
from evomerge.merge.recipe.recipe import Recipe
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import is_head
from evomerge.sources.open_models import Models

LEAST_WINDOW = 256 << 20  # bytes: below it starting a copy costs more than the copy


class Bank:
    """The tensors of the base and the sources by the names of what they are merged into, on one device.

    On the CPU checkpoints stay memory-mapped: the page cache of the operating system holds them.  On an accelerator a
    tensor is copied there on first use and stays while `capacity` bytes last, and so does what is computed from a
    source (the result of a nested recipe, the ranks of a source's elements); other tensors wait in pinned host memory
    and are copied while the tensors before them are merged.

    Threads may share a bank.
    """

    def __init__(
        self,
        models: Models,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        compiled: Compiled | None = None,
        slices: Sequence[Slice] = (),
        cache: Path | None = None,
        live: torch.dtype | None = None,
        share: Share | None = None,
        mapped: bool | None = None,
    ) -> None:
        """
        device: of the live models; tensors are on it or, for an Apple GPU, on the CPU.
        capacity: bytes that may stay on the device; by default what is free there, less what others need.
        compiled: the compiled kernels, if there are.
        slices: layers of the models that are stacked; without them every tensor is merged of its namesakes.
        cache: a folder for what takes long to compute from the sources; without it this is kept in memory.
        live: the type of a live model that will be loaded on the same device.
        share: how many processes use the same device and the same host.
        mapped: whether tensors are used where they are mapped, as a CPU does by default; otherwise they are copied and
            counted as on an accelerator.
        """
        self.models = models
        self.slices = list(slices)
        self.layout = build_layout(models, slices)
        self.compiled = compiled
        self.live_device = torch.device(device)
        self.device = merging_device(self.live_device)
        self.launcher = compiled.launcher if compiled is not None and self.device.type == "cuda" else None
        self.names = list(self.layout.tensors)
        self.layers = self.layout.layers
        mapped = self.device.type == "cpu" if mapped is None else mapped
        window = max(LEAST_WINDOW, 2 * max((sum(self.sizes(n)) for n in self.names), default=0))
        if capacity is None:
            elements = sum(math.prod(t.shape) for t in self.layout.tensors.values())
            coming = elements * live.itemsize if live else 0
            capacity = default_capacity(self.device, coming + window, share)
        self.room = Room(capacity)
        pinned = Room(pinned_capacity(host_memory(), (share or Share()).host))
        self.transfers = None if mapped else Transfers(self.device, window, pinned)
        self.prefetched = None if self.transfers is None else Prefetch(self.transfers)
        self.device_cache = DeviceCache(self.device, mapped, self.room, self.transfers)
        self.holds_all = mapped or sum(sum(self.sizes(n)) for n in self.names) <= capacity
        self.model_tensors = ModelTensors(models, self.device_cache, self.holds_all)
        self.derived_tensors = DerivedTensors(self.device, self.room, None if cache is None else cache / "derived")
        self.statistics_files = StatisticsFiles(models)
        self.measurement_cache: MeasurementCache = {}
        self.kept_inputs: dict[tuple[tuple[str, ...], int, frozenset[str]], dict[str, TensorInputs]] = {}
        """(sources, seed) -> the inputs of the tensors that stay in memory (`tensor_plan.py`)."""
        self.planes_stay = True

    def with_slices(self, slices: Sequence[Slice]) -> "Bank":
        """The bank of the same models for recipes with other slices.  What both hold in memory is there once."""
        other = copy(self)
        other.slices = list(slices)
        other.layout = build_layout(self.models, slices)
        other.names = list(other.layout.tensors)
        other.layers = other.layout.layers
        # What is kept by the names of output tensors would be that of other layers.
        other.measurement_cache, other.kept_inputs, other.planes_stay = {}, {}, False
        other.derived_tensors = DerivedTensors(self.device, self.room, None)
        return other

    # --- Which tensor of which model ---

    def merged_as(self, name: str) -> str:
        """The tensor that is merged for `name`: the embedding for a copy of it that the base stores as its head."""
        base = self.models.base
        return base.embedding_name or name if is_head(name) and base.ties_head else name

    def taking_part(self, name: str, sources: Sequence[str]) -> list[str]:
        """Those of the sources that the tensor `name` is merged of."""
        return [s for s in sources if self.layout.origin(s, name) is not None]

    def moves(self, source: str, name: str) -> bool:
        """Whether a source may differ from the base in the tensor `name`."""
        origin = self.layout.origin(source, name)
        return origin is not None and self.models.sources[source].may_differ(origin)

    def is_stored(self, source: str, name: str) -> bool:
        """Whether a source's tensor is read from a file, and nothing is computed."""
        origin = self.layout.origin(source, name)
        return origin is None or self.models.sources[source].is_stored(origin)

    def sizes(self, name: str) -> Iterator[int]:
        """Bytes of each tensor that `name` is merged of, on the device."""
        for source in ("", *self.models.sources):
            origin = self.layout.origin(source or BASE, name)
            if origin is None or (source and not self.models.sources[source].may_differ(origin)):
                continue
            yield self.size_of(source, origin, name)

    def size_of(self, source: str, origin: str, name: str) -> int:
        """Bytes of a model's tensor `origin`, which goes into `name`; what an adapter computes is float32."""
        model, info = self.models.sources[source] if source else self.models.base, self.layout.tensors[name]
        is_computed = isinstance(model, Adapter) and not model.is_stored(origin)
        return math.prod(info.shape) * 4 if is_computed else model.tensors.get(origin, info).bytes

    # --- Their tensors ---

    def base(self, name: str) -> Tensor:
        """The base's tensor for `name`; if the base takes no part, the first source's, which has the shape."""
        origin = self.layout.origin(BASE, name)
        if origin is None:
            return self.source(next(iter(self.layout.origins[name])), name)
        return self.model_tensors.get("", origin)

    def source(self, source: str, name: str) -> Tensor:
        """A source's tensor for `name`; the base's own object if an adapter does not change it."""
        origin = self.layout.origin(source, name)
        assert origin is not None, f"{source} has no part in {name}"
        model = self.models.sources[source]
        if not model.may_differ(origin):
            return self.model_tensors.get("", origin)
        return self.model_tensors.get(source, origin)

    def stay(self, name: str, sources: Sequence[str]) -> bool:
        """Whether the tensors of base and sources for `name` are the same objects for every candidate."""
        held = self.device_cache.held
        if self.slices or ("", name) not in held:
            return False
        return all((s if self.models.sources[s].may_differ(name) else "", name) in held for s in sources)

    def plane(self, key: Key, make: Callable[[], Tensor]) -> Tensor:
        """A measurement of every element of a tensor, on the device; `make` computes it if it is not kept."""
        kept = self.measurement_cache.get(key)
        if not self.planes_stay:
            return make() if kept is None else self.device_cache.on_device(kept)
        if kept is None:
            return self.device_cache.get(key, make)
        return self.device_cache.get(key, lambda: self.device_cache.on_device(kept), in_place=self.device_cache.mapped)

    # --- While output tensors are merged one after the other ---

    def prefetch(self, name: str, sources: Sequence[str]) -> bool:
        """Begin to copy what an output tensor is merged of, while others are merged.

        sources: those that will be read.

        False if as much is on its way as may be; then call again after the next tensor.
        """
        if self.prefetched is None or name in self.prefetched.begun:
            return True
        wanted: dict[Key, Callable[[], Tensor]] = {}
        size = 0
        for source in ("", *sources):
            origin = self.layout.origin(source or BASE, name)
            model = self.models.sources[source] if source else self.models.base
            if origin is not None and model.may_differ(origin) and model.is_stored(origin):
                wanted[source, origin] = lambda m=model, n=origin: m.read(n)  # type: ignore[misc]
                size += self.size_of(source, origin, name)
            plane: Key = ("levels", name, source)
            if plane in self.measurement_cache:
                wanted[plane] = lambda k=plane: self.measurement_cache[k]  # type: ignore[misc]
                size += math.prod(self.layout.tensors[name].shape)
        held = self.device_cache.held
        return self.prefetched.send(name, {k: read for k, read in wanted.items() if k not in held}, size)

    def begin(self, name: str) -> None:
        """The tensor `name` is merged from now on: drop tensors that did not fit, and copies for tensors before it."""
        if self.prefetched is not None:
            self.prefetched.drop_before(name)
        self.device_cache.in_use.clear()

    def end(self) -> None:
        """Nothing is merged now: drop all tensors that did not fit."""
        if self.prefetched is not None:
            self.prefetched.drop_all()
        self.device_cache.in_use.clear()

    # --- What is computed of them ---

    def statistics(self, recipe: Recipe, names: Sequence[str] | None = None) -> list[StatisticsFile]:
        """The statistics files of a recipe's sources; see `StatisticsFiles.of`."""
        return self.statistics_files.of(recipe, names)

    def derived(
        self, plan: Derived, name: str, sources: Sequence[str], statistics: Sequence[StatisticsFile]
    ) -> list[Tensor]:
        """The matrices of a plan; see `DerivedTensors.get`."""

        def operands() -> list[Tensor]:
            return [self.base(name), *(self.source(s, name) for s in sources)]

        return self.derived_tensors.get(plan, name, sources, operands, statistics)

    def measurements(
        self, name: str, sources: Sequence[str], seed: int = 0, statistics: Sequence[StatisticsFile] = ()
    ) -> Measurements:
        """The answers to a planner's questions about a tensor; nothing is measured twice.

        seed: of the random masks.
        """

        def mask(source: int, chance: Chance, part: slice) -> Tensor:
            tensor_key, source_keys = mask_keys(seed, name, sources)
            levels = measured.levels(source).reshape(-1)[part] if chance.step else None
            keys = tensor_key, source_keys[source]
            return random_mask(chance, part.start, part.stop - part.start, keys, levels, self.device)

        scan = self.compiled.scan if self.compiled is not None else None
        measured = Measurements(self, name, sources, self.measurement_cache, mask, statistics, scan, self.plane)
        return measured
