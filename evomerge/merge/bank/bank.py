"""The bank: base and sources where they fit, and what was measured of them, tensor by tensor."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.merge.bank.memory import Room, Share, default_capacity, host_memory, pinned_capacity
from evomerge.merge.bank.operands import Operands
from evomerge.merge.bank.transfer import Transfers
from evomerge.merge.kernels.call import Keys
from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.kernels.derived import derive, derived_key, kept
from evomerge.merge.kernels.execute import random_mask
from evomerge.merge.measure.measurements import Kept, Measurements
from evomerge.merge.measure.statistics_file import StatisticsFile, open_statistics_file
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.plan import Chance, Derived
from evomerge.merge.recipe.layout import build_layout
from evomerge.merge.recipe.recipe import Recipe
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.sources.adapter import Adapter
from evomerge.sources.adapter.tensor_change import TensorChange
from evomerge.sources.checkpoint import is_head
from evomerge.sources.open_models import Models

LEAST_WINDOW = 256 << 20  # bytes: below it a copy's beginning costs more than the copy

Key = tuple[str, ...]
"""(source, tensor), the source empty for the base; or (kind, tensor, source) of what was measured."""


class Bank:
    """Tensors of the base and the sources by the names of what they are merged into, on one device.

    layout: what is merged into what; with `slices`, other layers than the namesakes.

    On the CPU checkpoints stay memory-mapped: the page cache is the bank.  On an accelerator a tensor is copied
    there on first use and stays while `capacity` bytes last, and so does what a source makes of it (a nested recipe's
    result, the ranks of a source's elements); the others wait in pinned host memory and are copied while the tensors
    before them are merged.  An adapter's matrices stay there, and its sum with the base only where all fits.
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
        """cache: a folder for what takes long to make of the sources; without it that is kept in memory.

        live: the type of a live model that will be loaded on the same device.  share: who else uses device and host.
        mapped: whether tensors are used where they are mapped, as a CPU does by default; else they are copied and
        counted as on an accelerator.
        """
        self.models = models
        self.slices = list(slices)
        self.layout = build_layout(models, slices)
        self.compiled = compiled
        self.device = torch.device(device)
        self.launcher = compiled.launcher if compiled is not None and self.device.type == "cuda" else None
        self.names = list(self.layout.tensors)
        self.layers = self.layout.layers
        self.mapped = self.device.type == "cpu" if mapped is None else mapped
        window = max(LEAST_WINDOW, 2 * max((sum(self.sizes(n)) for n in self.names), default=0))
        if capacity is None:
            elements = sum(math.prod(t.shape) for t in self.layout.tensors.values())
            coming = elements * live.itemsize if live else 0
            capacity = default_capacity(self.device, coming + window, share)
        self.room = Room(capacity)
        pinned = Room(pinned_capacity(host_memory(), (share or Share()).host))
        self.transfers = None if self.mapped else Transfers(self.device, window, pinned)
        self.ahead: dict[str, list[Key]] = {}
        self.holds_all = self.mapped or sum(sum(self.sizes(n)) for n in self.names) <= capacity
        self.changes: dict[Key, TensorChange] = {}  # of adapters, on the device
        self.held: dict[Key, Tensor] = {}
        self.lock = threading.Lock()
        self.local = threading.local()
        self.kept: Kept = {}
        self.cache = cache
        self.made: dict[tuple[str, ...], list[Tensor]] = {}
        self.digests: dict[tuple[str, ...], str] = {}
        self.files: dict[tuple[str, str], StatisticsFile] = {}
        self.operands: dict[tuple[tuple[str, ...], int], dict[str, Operands]] = {}

    def merged_as(self, name: str) -> str:
        """The tensor that is merged for `name`: the embedding for a copy of it that the base stores as its head."""
        base = self.models.base
        return base.embedding_name or name if is_head(name) and base.ties_head else name

    @property
    def recent(self) -> dict[Key, Tensor]:
        """What did not fit and is used now, by this thread."""
        if not hasattr(self.local, "recent"):
            self.local.recent = {}
        found: dict[Key, Tensor] = self.local.recent
        return found

    def sizes(self, name: str) -> Iterator[int]:
        """Bytes of each tensor that `name` is made of, as it lies on the device."""
        for source in ("", *self.models.sources):
            origin = self.layout.origin(source or BASE, name)
            if origin is None or (source and not self.models.sources[source].may_differ(origin)):
                continue
            yield self.size_of(source, origin, name)

    def size_of(self, source: str, origin: str, name: str) -> int:
        """Bytes of a model's tensor `origin`, which goes into `name`; an adapter's is float32."""
        model, info = self.models.sources[source] if source else self.models.base, self.layout.tensors[name]
        is_computed = isinstance(model, Adapter) and not model.is_stored(origin)
        return math.prod(info.shape) * 4 if is_computed else model.tensors.get(origin, info).bytes

    def base(self, name: str) -> Tensor:
        """The base's tensor; where it takes no part, the first source's, to give the shape."""
        origin = self.layout.origin(BASE, name)
        if origin is None:
            return self.source(next(iter(self.layout.origins[name])), name)
        return self.fetch("", origin)

    def source(self, source: str, name: str) -> Tensor:
        """A source's tensor; the base's own object if an adapter does not touch it."""
        origin = self.layout.origin(source, name)
        assert origin is not None, f"{source} has no part in {name}"
        model = self.models.sources[source]
        if not model.may_differ(origin):
            return self.fetch("", origin)
        return self.fetch(source, origin)

    def is_stored(self, source: str, name: str) -> bool:
        """Whether reading a source's tensor computes nothing."""
        origin = self.layout.origin(source, name)
        return origin is None or self.models.sources[source].is_stored(origin)

    def stay(self, name: str, sources: Sequence[str]) -> bool:
        """Whether base and sources of `name` are the same objects at every candidate."""
        if self.slices or ("", name) not in self.held:
            return False
        return all((s if self.models.sources[s].may_differ(name) else "", name) in self.held for s in sources)

    def taking_part(self, name: str, sources: Sequence[str]) -> list[str]:
        """Those of the sources that the tensor `name` is made of."""
        return [s for s in sources if self.layout.origin(s, name) is not None]

    def fetch(self, source: str, name: str) -> Tensor:
        """A model's own tensor `name`, the base's if `source` is empty."""
        model = self.models.sources[source] if source else self.models.base
        in_place = self.mapped and model.is_stored(name)
        may_stay = self.holds_all or model.is_stored(name) or not isinstance(model, Adapter)
        return self.get((source, name), lambda: self.read(source, name), in_place, may_stay)

    def plane(self, key: Key, make: Callable[[], Tensor]) -> Tensor:
        """What was measured of every element of a tensor, on the device; made if it is not kept."""
        kept = self.kept.get(key)
        if kept is None:
            return self.get(key, make)
        return self.get(key, lambda: self.on_device(kept), in_place=self.mapped)

    def get(self, key: Key, read: Callable[[], Tensor], in_place: bool = False, may_stay: bool = True) -> Tensor:
        """The tensor under a key: held, used by this thread, on its way, or read now.

        in_place: it takes no memory.  may_stay: whether it is held if there is room for it.
        """
        for store in (self.held, self.recent):
            if key in store:
                return store[key]
        tensor = self.transfers.receive(key) if self.transfers else None
        if tensor is None:
            tensor = read()
        with self.lock:
            if key in self.held:  # another thread was faster
                return self.held[key]
            if in_place or (may_stay and self.room.take(tensor.nbytes)):
                self.held[key] = tensor
                return tensor
        self.recent[key] = tensor
        return tensor

    def read(self, source: str, name: str) -> Tensor:
        """A model's tensor on the device.  What an adapter adds is computed there."""
        model = self.models.sources[source] if source else self.models.base
        if self.mapped or not isinstance(model, Adapter) or model.is_stored(name) or model.base is not self.models.base:
            return self.on_device(model.read(name))
        if (source, name) not in self.changes:
            change = model.change_of(name)
            assert change is not None, "an adapter that computes changes something"
            self.changes[source, name] = change.to(self.device)
        return self.changes[source, name].apply(self.fetch("", name))

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device."""
        return tensor if self.mapped else tensor.to(self.device, copy=self.device.type == "cpu")

    def prefetch(self, name: str, sources: Sequence[str]) -> bool:
        """Begin to copy what an output tensor is made of, while others are merged.

        sources: those that will be read.  False if as much is on its way as may be; ask again after the next tensor.
        """
        if self.transfers is None or name in self.ahead:
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
            if plane in self.kept:
                wanted[plane] = lambda k=plane: self.kept[k]  # type: ignore[misc]
                size += math.prod(self.layout.tensors[name].shape)
        on_way = self.transfers.coming
        wanted = {k: read for k, read in wanted.items() if k not in self.held and k not in on_way}
        if wanted and not self.transfers.fits(size):
            return False
        for key, read in wanted.items():
            self.transfers.send(key, read)
        self.ahead[name] = list(wanted)
        return True

    def begin(self, name: str) -> None:
        """The tensor `name` is merged from now on: what did not fit is let go, and what was sent for tensors before."""
        if self.transfers is not None:
            while name in self.ahead and (earlier := next(iter(self.ahead))) != name:
                self.transfers.drop(self.ahead.pop(earlier))
            self.transfers.finish()
        self.recent.clear()

    def end(self) -> None:
        """Nothing is merged now: nothing that did not fit stays."""
        if self.transfers is not None:
            for keys in self.ahead.values():
                self.transfers.drop(keys)
            self.transfers.finish()
        self.ahead.clear()
        self.recent.clear()

    def statistics(self, recipe: Recipe, names: Sequence[str] | None = None) -> list[StatisticsFile]:
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
                self.files[key] = open_statistics_file(Path(source.statistics), kind, source.name, self.models)
            found.append(self.files[key])
        for other in found[1:]:
            if differing := sorted(other.names ^ found[0].names):
                raise EvomergeError(f"{other.path} and {found[0].path}: only one of them has {differing[0]}")
        return found

    def derived(
        self, plan: Derived, name: str, sources: Sequence[str], statistics: Sequence[StatisticsFile]
    ) -> list[Tensor]:
        """The D_j of a plan.  What does not depend on settings is made once: in the cache folder, or in memory as
        long as there is room."""

        def operands() -> list[Tensor]:
            return [self.base(name), *(self.source(s, name) for s in sources)]

        def make() -> list[Tensor]:
            base, *others = operands()
            return derive(plan, name, base, others, statistics if plan.settings else ())

        if plan.settings:
            return [d.to(self.device) for d in make()]
        key = (plan.kind, name, *sources)
        if key in self.made:
            return self.made[key]
        if self.cache is not None:
            if key not in self.digests:
                self.digests[key] = derived_key(plan.kind, operands())
            made = kept(self.cache / "derived", self.digests[key], make)
        else:
            made = make()
        made = [d.to(self.device) for d in made]
        is_mapped = self.cache is not None and self.device.type == "cpu"
        if is_mapped or self.room.take(sum(d.nbytes for d in made)):
            self.made[key] = made
        return made

    def measurements(
        self, name: str, sources: Sequence[str], seed: int = 0, statistics: Sequence[StatisticsFile] = ()
    ) -> Measurements:
        """What planners may ask about a tensor; whatever was measured before is not measured again."""

        def mask(source: int, chance: Chance, part: slice) -> torch.Tensor:
            words = mask_keys(seed, name, sources)
            levels = measured.levels(source).reshape(-1)[part] if chance.step else None
            own = words[0], words[1][source]
            return random_mask(chance, part.start, part.stop - part.start, own, levels, self.device)

        scan = self.compiled.scan if self.compiled is not None else None
        measured = Measurements(self, name, sources, self.kept, mask, statistics, scan, self.plane)
        return measured


@lru_cache(maxsize=65536)
def mask_key(seed: int, tensor: str, source: str = "") -> int:
    """The 64-bit word that names the random masks of a tensor, or of one source's, under one seed."""
    return int.from_bytes(blake2b(f"{seed}\0{tensor}\0{source}".encode(), digest_size=8).digest(), "little")


def mask_keys(seed: int, tensor: str, sources: Sequence[str]) -> Keys:
    """The words of a tensor's masks: its own, and each source's."""
    return mask_key(seed, tensor), [mask_key(seed, tensor, s) for s in sources]
