"""The models' own tensors on a device, by model and name."""

from torch import Tensor

from evomerge.merge.bank.device_cache import DeviceCache, Key
from evomerge.sources.adapter import Adapter
from evomerge.sources.adapter.tensor_change import TensorChange
from evomerge.sources.open_models import Models


class ModelTensors:
    """Reads tensors of the base and the sources onto a device, through a cache.

    The matrices of an adapter stay on the device; its sum with the base stays only if everything fits.
    """

    def __init__(self, models: Models, cache: DeviceCache, holds_all: bool) -> None:
        """holds_all: whether everything fits on the device."""
        self.models, self.cache, self.holds_all = models, cache, holds_all
        self.changes: dict[Key, TensorChange] = {}
        """What adapters add, on the device."""

    def get(self, source: str, name: str) -> Tensor:
        """A model's own tensor `name`; the base's if `source` is empty."""
        model = self.models.sources[source] if source else self.models.base
        in_place = self.cache.mapped and model.is_stored(name)
        may_stay = self.holds_all or model.is_stored(name) or not isinstance(model, Adapter)
        return self.cache.get((source, name), lambda: self.read(source, name), in_place, may_stay)

    def read(self, source: str, name: str) -> Tensor:
        """Read a model's own tensor onto the device.  What an adapter adds is computed there."""
        model = self.models.sources[source] if source else self.models.base
        is_mapped = self.cache.mapped
        if is_mapped or not isinstance(model, Adapter) or model.is_stored(name) or model.base is not self.models.base:
            return self.cache.on_device(model.read(name))
        if (source, name) not in self.changes:
            change = model.change_of(name)
            assert change is not None, "an adapter that computes changes something"
            self.changes[source, name] = change.to(self.cache.device)
        return self.changes[source, name].apply(self.get("", name))
