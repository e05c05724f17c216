"""The matrices of `Derived` plans: computed once, and kept in a folder or in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evomerge.merge.bank.memory import Room
from evomerge.merge.kernels.derived import cached, derive, derived_key
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import Derived


class DerivedTensors:
    """The matrices D_j of plans by kind, tensor and sources."""

    def __init__(self, device: torch.device, room: Room, folder: Path | None) -> None:
        """folder: where matrices are kept; without it they are kept in memory, as long as there is room."""
        self.device, self.room, self.folder = device, room, folder
        self.kept: dict[tuple[str, ...], list[Tensor]] = {}
        self.digests: dict[tuple[str, ...], str] = {}

    def get(
        self,
        plan: Derived,
        name: str,
        sources: Sequence[str],
        operands: Callable[[], list[Tensor]],
        statistics: Sequence[StatisticsFile],
    ) -> list[Tensor]:
        """The D_j of a plan for the tensor `name`, on the device.

        operands: reads the base's tensor and those of the sources.

        Matrices that depend on a method's coefficients (`plan.settings`) are computed each time.
        """

        def make() -> list[Tensor]:
            base, *others = operands()
            return derive(plan, name, base, others, statistics if plan.settings else ())

        if plan.settings:
            return [d.to(self.device) for d in make()]
        key = (plan.kind, name, *sources)
        if key in self.kept:
            return self.kept[key]
        if self.folder is not None:
            if key not in self.digests:
                self.digests[key] = derived_key(plan.kind, operands())
            made = cached(self.folder, self.digests[key], make)
        else:
            made = make()
        made = [d.to(self.device) for d in made]
        is_mapped = self.folder is not None and self.device.type == "cpu"
        if is_mapped or self.room.take(sum(d.nbytes for d in made)):
            self.kept[key] = made
        return made
