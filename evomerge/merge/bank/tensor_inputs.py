"""What one output tensor is merged of (`TensorInputs`); kept from candidate to candidate while it stays in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from evomerge.merge.bank.device_cache import Key
from evomerge.merge.kernels.operands import Keys, Memo
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import FisherBlend, Plan, SparseBlend
from evomerge.sources.tensor_names import TensorRole


@dataclass(eq=False, slots=True)
class TensorInputs:
    """What a tensor is merged of, before there is a plan.

    name: of the tensor in the layout.
    names: the sources that take part.
    where: its layer and component.
    base: the base's tensor.
    measured: answers to a planner's questions.
    statistics: the sources' statistics files.
    stored: for each source, whether its tensor is read from a file and not computed.
    keys: of the random masks.
    sources: the sources' tensors, once all of them stay in memory; `memo` then belongs to the last call over them.
    levels: the planes of a mask by rank, once they stay in memory.
    """

    name: str
    names: tuple[str, ...]
    where: TensorRole
    base: Tensor
    measured: Measurements
    statistics: list[StatisticsFile]
    stored: list[bool]
    keys: Keys
    sources: list[Tensor] | None = None
    levels: list[Tensor] | None = None
    memo: Memo = field(default_factory=Memo)

    def planes(self, plan: Plan, held: Mapping[Key, Tensor]) -> list[Tensor]:
        """What the plan needs of every element besides the tensors.  held: tensors that stay in memory, by key."""
        if isinstance(plan, FisherBlend):
            return [g.read(self.name).to(self.base.device) for g in self.statistics]
        if not isinstance(plan, SparseBlend) or plan.keep != "rank" or plan.chances is None:
            return self.measured.planes(plan)
        has_steps = 0 not in [c.step for c in plan.chances]
        if has_steps and self.levels is not None:
            return self.levels
        levels = self.measured.planes(plan)
        if has_steps and self.sources is not None and all(("levels", self.name, s) in held for s in self.names):
            self.levels = levels
        return levels
