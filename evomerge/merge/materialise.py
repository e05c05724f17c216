"""Materialise a recipe: write the merged tensors.  Searches, exports and the command `merge` all come through here.

For each output tensor: `tensor_plan.py` gives a plan and its operands, and `kernels/execute.py` computes it.  On a CUDA
device `Batch` does the same for many tensors at a time.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.call import Call, call_of
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.launch import Launcher
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.methods.plan import Blend, Plan, SparseBlend
from evomerge.merge.recipe.recipe import Recipe, check_layers
from evomerge.merge.tensor_plan import RecipeInputs, plan_tensor, remembered_knobs, sources_of
from evomerge.sources.tensor_names import tensor_role

STREAMED = 64 << 20  # bytes of operands that do not stay on the device, after which a launch follows


class NotFinite(ArithmeticError):
    """A merged tensor holds NaN or infinity: the candidate is broken, and the next one may not be."""


@torch.no_grad()
def materialise_tensor(recipe: Recipe, bank: Bank, name: str, out: Tensor) -> Tensor:
    """Write the merged tensor `name` to `out`.

    out: of the tensor's shape and the recipe's dtype, on the bank's device.

    Tensors of integers (position tables of old checkpoints) are copied from the base.  Returns the largest |out| as a
    scalar on the bank's device, NaN if any element is; `check_finite` reads it.
    """
    bank.begin(name)
    recipe_inputs = RecipeInputs(recipe, bank)
    inputs = recipe_inputs.get(name)
    largest = write_tensor(plan_tensor(recipe, bank, inputs, recipe.knobs), bank, inputs.base, out)
    recipe_inputs.keep(name, inputs)
    return largest


def write_tensor(planned: tuple[Plan, Operands] | None, bank: Bank, base: Tensor, out: Tensor) -> Tensor:
    """Execute a plan, or copy the base if there is none; the largest |out| as a scalar, 0 for a copy."""
    if planned is None:
        out.copy_(base)
        return torch.zeros((), device=bank.device)
    plan, operands = planned
    target = contiguous_target(out)
    largest = execute(plan, target, operands, bank.compiled)
    if target is not out:
        out.copy_(target)
    return largest


def contiguous_target(out: Tensor) -> Tensor:
    """A contiguous tensor to write to: `out`, or a new one that must then be copied to it."""
    return out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)


class Batch:
    """Tensors of one candidate on a device; they are merged when `launch` is called, or much memory waits for it."""

    def __init__(self, recipe: Recipe, bank: Bank, launcher: Launcher) -> None:
        self.recipe, self.bank, self.launcher = recipe, bank, launcher
        self.knobs = remembered_knobs(recipe)
        self.inputs = RecipeInputs(recipe, bank)
        self.waiting: list[tuple[str, Tensor, Tensor, Call]] = []
        """Name, output, what is written to, call."""
        self.largest: list[tuple[list[str], Tensor]] = []
        """Names of tensors that were merged, and the largest |out| of each, (names,) float32."""

    def add(self, name: str, out: Tensor) -> None:
        """Plan the output tensor `name`, to be written to `out`."""
        if not self.waiting:
            self.bank.begin(name)
        inputs = self.inputs.get(name)
        planned = plan_tensor(self.recipe, self.bank, inputs, self.knobs)
        plan, operands = planned or (None, None)
        # What was computed for this tensor alone (a `Derived` plan's matrices, turns) would all wait in memory.
        if operands is not None and operands.base is inputs.base and isinstance(plan, Blend | SparseBlend):
            self.waiting.append((name, out, contiguous_target(out), call_of(plan, operands)))
        else:
            self.largest.append(([name], write_tensor(planned, self.bank, inputs.base, out)[None]))
        self.inputs.keep(name, inputs)
        if (in_use := self.bank.device_cache.in_use) and sum(x.nbytes for x in in_use.values()) > STREAMED:
            self.launch()

    def launch(self) -> None:
        """Merge the tensors that wait."""
        if not self.waiting:
            return
        found = self.launcher.run([(target, call) for _, _, target, call in self.waiting])
        self.largest.append(([name for name, *_ in self.waiting], found))
        for _, out, target, _ in self.waiting:
            if target is not out:
                out.copy_(target)
        self.waiting.clear()


def check_finite(names: Sequence[str], largest: Tensor) -> None:
    """NotFinite, with the name of the first tensor whose largest magnitude is not finite.

    largest: those of the named tensors, (names,) float32; the device is waited for once.
    """
    finite = largest.isfinite().tolist()
    if not all(finite):
        raise NotFinite(f"{names[finite.index(False)]} is not finite after merging")


def check_fits(recipe: Recipe, bank: Bank) -> None:
    """EvomergeError if a bank was opened for other slices or another vocabulary than the recipe's, or the recipe has
    lists for another number of layers."""
    if recipe.slices != bank.slices:
        raise EvomergeError("this recipe has other `slices` than the models were opened for")
    if recipe.vocabulary != bank.models.requested_vocabulary:
        raise EvomergeError("this recipe has another `vocabulary` than the models were opened for")
    check_layers(recipe, bank.layers)


def widen(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy merged tensors to live ones of a wider type, and empty the list of pairs (live, merged)."""
    for live, merged in pairs:
        live.copy_(merged)
    pairs.clear()


@torch.no_grad()
def materialise(
    recipe: Recipe,
    bank: Bank,
    destinations: Mapping[str, Tensor],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Write every tensor of a candidate to its destination, in the bank's order.

    destinations: checkpoint name -> tensor to write to.  Its values are those of an export, rounded to the recipe's
        dtype, even if the tensor is of a wider type.
    between: called before each tensor; it may raise to stop.

    NotFinite if a merged tensor is not finite.
    """
    dtype = TORCH_DTYPES[recipe.dtype]
    check_fits(recipe, bank)
    largest: list[tuple[list[str], Tensor]] = []
    widened: list[tuple[Tensor, Tensor]] = []
    names = [name for name in bank.names if name in destinations]
    batch = Batch(recipe, bank, bank.launcher) if bank.launcher else None
    sent = 0
    try:
        for done, name in enumerate(names):
            between()
            sent = len(names) if bank.holds_all else max(sent, done)
            while sent < len(names) and bank.prefetch(names[sent], read_by(recipe, bank, names[sent])):
                sent += 1
            live = destinations[name]
            kept = dtype if live.is_floating_point() else live.dtype
            out = live
            if (live.dtype, live.device.type) != (kept, bank.device.type):
                out = torch.empty_like(live, dtype=kept, device=bank.device)
            if batch is not None:
                batch.add(name, out)
            else:
                largest.append(([name], materialise_tensor(recipe, bank, name, out)[None]))
            if out is not live:
                widened.append((live, out))
            if batch is None:
                widen(widened)
        if batch is not None:
            batch.launch()
            widen(widened)
    finally:
        bank.end()
    found = batch.largest if batch is not None else largest
    if found:
        check_finite([name for several, _ in found for name in several], torch.cat([x for _, x in found]))


def read_by(recipe: Recipe, bank: Bank, name: str) -> list[str]:
    """The sources that will be read for a tensor, as far as weights tell: one of weight 0 is mostly not read."""
    names = sources_of(recipe, bank, name)
    if not names:
        return []
    weights = recipe.knobs(tensor_role(name), bank.layers, names).each.get("weight", [1.0] * len(names))
    return [s for s, weight in zip(names, weights, strict=True) if weight]
