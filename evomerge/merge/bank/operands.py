"""What one tensor is merged of; kept from candidate to candidate while it stays where it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from evomerge.merge.kernels.call import Keys, Memo
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods.plan import Plan, SparseBlend
from evomerge.sources.tensor_names import TensorRole


@dataclass(eq=False, slots=True)
class Operands:
    """The operands of one tensor, and what depends on them alone.

    names: the sources that take part.  stored: which of them are read without computing.  keys: of random masks.
    sources: all of them, once they stay where they are; `memo` then remembers the last call over them.
    levels: the planes of a mask by rank, once they stay.
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

    def planes(self, plan: Plan, held: Mapping[tuple[str, ...], Tensor]) -> list[Tensor]:
        """What the plan's mask needs beside the tensors.  held: what stays where it is, by the bank's keys."""
        if not isinstance(plan, SparseBlend) or plan.keep != "rank" or plan.chances is None:
            return self.measured.planes(plan)
        has_steps = 0 not in [c.step for c in plan.chances]
        if has_steps and self.levels is not None:
            return self.levels
        levels = self.measured.planes(plan)
        if has_steps and self.sources is not None and all(("levels", self.name, s) in held for s in self.names):
            self.levels = levels
        return levels
