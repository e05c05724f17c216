"""The low-rank factors of one tensor's change: `exact_change` concatenates those of adapters, `truncated` approximates.

Exact. Of adapters with the changes s_i B_i A_i and a merge  out = b + sum_i c_i (x_i - b)  the change is

    sum_i c_i s_i B_i A_i = [c_1 s_1 B_1, c_2 s_2 B_2, ...] [A_1; A_2; ...]

whose rank is the sum of the ranks (PEFT's `cat` of `add_weighted_adapter`).

Truncated. The largest singular values of out - b, by subspace iteration from a random start (Halko et al. 2011,
algorithms 4.4 and 5.1); of small matrices by a full decomposition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import NotFinite
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.plan import Blend
from evomerge.merge.recipe.recipe import Recipe
from evomerge.merge.tensor_plan import RecipeInputs
from evomerge.sources.adapter import Adapter

SUM_ROUNDING = 1e-6  # coefficients that add up to 1 but for this are rounded thirds and the like
SMALL = 256  # a matrix with a side of at most this is decomposed in full
OVERSAMPLING, ITERATIONS = 16, 8
SEED = 0  # of the random start


class NotLinear(ValueError):
    """The merge is not base + a linear combination of adapters; the message says why."""


@dataclass(frozen=True)
class Factors:
    """The product left @ right.

    left: (rows, R) float32.  right: (R, columns) float32.
    energy: the share of the squared change that it keeps.  change: the squared Frobenius norm of the whole change.
    """

    left: Tensor
    right: Tensor
    energy: float = 1.0
    change: float = 0.0

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def bound(self) -> float:
        """No element of the product is larger in magnitude; NaN if a factor has one."""
        sides = self.left.abs().amax(0).double(), self.right.abs().amax(1).double()  # (R,) each
        return float((sides[0] * sides[1]).sum())


def exact_change(recipe: Recipe, bank: Bank, inputs: RecipeInputs, name: str) -> Factors | bool:
    """The change of the tensor `name`: its factors, False if there is none, True if it is not low-rank alone.

    NotLinear if the merge is not linear in adapters there; NotFinite if the change has NaN or infinity.
    """
    found = inputs.get(name)
    if not found.base.is_floating_point() or not found.names:
        return False
    method = METHODS[recipe.method]
    if method.in_turn and len(found.names) > 1:
        raise NotLinear(f"{recipe.method} is not linear in its sources")
    plan = method.plan(recipe.knobs(found.where, bank.layers, found.names), found.measured)
    if not isinstance(plan, Blend):
        raise NotLinear(f"{recipe.method} is not linear in its sources")
    total = 1.0 if plan.of_task_vectors else plan.base + sum(plan.sources)
    if abs(total - 1) > SUM_ROUNDING:
        raise NotLinear(
            f"the coefficients of {recipe.method} add up to {total:.4g} at {name}, so the base itself would be scaled"
        )
    lefts, rights, whole = [], [], False
    for source, coefficient in zip(found.names, plan.sources, strict=True):
        model, origin = bank.models.sources[source], bank.layout.origin(source, found.name)
        if not coefficient or origin is None:
            continue
        if not isinstance(model, Adapter):
            raise NotLinear(f"source {source} is not a LoRA adapter")
        change = model.change_of(origin)
        if change is None:
            continue
        product = change.low_rank
        copied = change.whole is None or equal(change.whole, found.base)  # PEFT saves an adapted embedding as it was
        if not copied or change.added is not None or change.rows is not None:
            whole = True
        elif product is None:
            continue
        elif product.left.ndim != 2:
            raise NotLinear(f"{name} stacks experts, for which PEFT has no plain pair of factors")
        else:
            lefts.append(product.left.float() * (coefficient * product.scale))
            rights.append(product.right.float())
    if whole:
        return True
    if not lefts:
        return False
    factors = Factors(torch.cat(lefts, 1), torch.cat(rights, 0))
    if not factors.bound < torch.finfo(torch.float32).max:  # so is NaN
        raise NotFinite(f"{name} is not finite after merging")
    return factors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, whatever their types."""
    return one.shape == other.shape and torch.equal(one.float(), other.float().to(one.device))


def truncated(change: Tensor, rank: int, floor: float) -> Factors | None:
    """The best factors of at most `rank`; None if the whole change is rounding.

    change: (rows, columns) float32.
    floor: singular values up to this are rounding, and left out.
    """
    whole = float(change.double().square().sum())
    u, s, vh = leading(change, rank)
    kept = int((s > floor).sum())
    if not kept:
        return None
    root = s[:kept].sqrt()
    energy = min(1.0, float(s[:kept].double().square().sum()) / whole)
    return Factors(u[:, :kept] * root, root[:, None] * vh[:kept], energy, whole)


def leading(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: u (rows, R), s (R,), vh (R, columns), R = min(rank, rows, columns)."""
    count = min(rank, *x.shape)
    width = 2 * count + OVERSAMPLING  # of random noise, whose values fall slowly, 1 to 2% of the energy are missed
    if min(x.shape) <= max(SMALL, 2 * width):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
    else:
        start = torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(SEED)).to(x)
        q = torch.linalg.qr(x @ start).Q
        for _ in range(ITERATIONS):
            q = torch.linalg.qr(x @ torch.linalg.qr(x.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ x, full_matrices=False)
        u = q @ u
    return u[:, :count], s[:count], vh[:count]
