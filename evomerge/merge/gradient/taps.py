"""Hooks on the live model that reduce the gradients of its weights to those of a recipe's coefficients: `KnobTaps`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.tensor_inputs import TensorInputs
from evomerge.merge.gradient.chain import PlanDerivative, derivative_of_plan, learnable
from evomerge.merge.gradient.inner_products import Change, by_blend, by_numbers
from evomerge.merge.gradient.low_rank import LowRankTap
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.materialise import check_fits
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.plan import Blend, Derived, SliceBlend
from evomerge.merge.recipe.recipe import Recipe
from evomerge.merge.recipe.slices import BASE
from evomerge.merge.tensor_plan import RecipeInputs, remembered_knobs
from evomerge.sources.adapter import Adapter
from evomerge.sources.adapter.tensor_change import LowRank, TensorChange
from evomerge.sources.tensor_names import Component, Part, TensorRole, coefficient_layer


@dataclass
class KnobGradient:
    """The derivative of a loss by the coefficients of a recipe.

    values: (knob, source, or None for a knob that all share) -> part, or component without parts -> (layers,) float64,
        the derivative by the knob's value there, summed over the backward passes.  Those whose weights do not depend on
        the knob are absent.
    sums: of each tensor that is watched, the derivative by its plan's numbers so far.
    """

    values: dict[tuple[str, str | None], dict[Component | Part, NDArray[np.float64]]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the backward passes so far."""
        for each in self.sums:
            each.zero_()


@dataclass(eq=False)
class TensorTap:
    """One merged tensor whose gradient is needed.

    name: in the layout.
    live: where the live model holds it.
    names: the sources that take part.
    inner: the derivative of the loss by the plan's numbers, (n,) float64.
    """

    name: str
    live: Tensor
    where: TensorRole
    names: tuple[str, ...]
    derivative: PlanDerivative
    inner: Tensor


class KnobTaps:
    """The derivative of a loss by every coefficient of a recipe, on a live model.

    Example:
        taps = KnobTaps(model, bank, found := destinations(model, bank))
        materialise(recipe, bank, found)
        with taps.watch(recipe) as gradient:
            loss_of(model).backward()
        gradient.values["weight", "math"]["mlp"]  # (layers,)
    """

    def __init__(self, model: Any, bank: Bank, destinations: Mapping[str, Tensor]) -> None:
        """destinations: see `materialise`; tensors of the model's parameters, or views of them."""
        self.model, self.bank, self.destinations = model, bank, destinations
        self.parameters: dict[int, list[nn.Parameter]] = {}
        """Address of a storage -> the parameters in it."""
        self.owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter not in self.owners:
                    self.parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
                self.owners.setdefault(parameter, []).append((module, name))
        self.changes: dict[tuple[str, str], TensorChange] = {}
        """(source, tensor) -> what an adapter changes, on the device."""

    @contextmanager
    def watch(self, recipe: Recipe) -> Iterator[KnobGradient]:
        """Sum the derivatives of all backward passes inside a `with` block; they are there when it ends.

        recipe: the one that was materialised into the model.

        Inside the block weights of the model may require gradients; each one is dropped as soon as it is reduced.
        At the end, also by an exception, the model is as before: no hooks, no gradients, the same `requires_grad`.

        Raises EvomergeError if the method has no coefficient with a derivative, or the recipe does not fit the bank.
        """
        if not learnable(METHODS[recipe.method], len(recipe.sources)):
            raise EvomergeError(
                f"method: {recipe.method} has no coefficient that a gradient can be computed by; use another sampler"
            )
        check_fits(recipe, self.bank)
        gradient, handles = KnobGradient(), []
        full: dict[nn.Parameter, list[TensorTap]] = {}
        required: dict[nn.Parameter, bool] = {}
        tapped: list[TensorTap] = []
        try:
            for tap in self.tensor_taps(recipe):
                tapped.append(tap)
                parameter = self.holder(tap.live)
                linear = self.linear(tap, parameter)
                if linear is not None:
                    module, low_rank = linear
                    tap.inner = low_rank.inner
                    handles.append(module.register_forward_hook(low_rank.hook, with_kwargs=True))
                else:
                    full.setdefault(parameter, []).append(tap)
            gradient.sums = [tap.inner for tap in tapped]
            handles.append(self.model.get_input_embeddings().register_forward_hook(start_graph))
            inputs = RecipeInputs(recipe, self.bank)
            for parameter, parts in full.items():
                required[parameter] = parameter.requires_grad
                parameter.requires_grad_(True)

                def reduce(p: Tensor, parts: list[TensorTap] = parts) -> None:
                    self.reduce(inputs, p, parts)

                handles.append(parameter.register_post_accumulate_grad_hook(reduce))  # type: ignore[no-untyped-call]
            yield gradient
            for tap in tapped:
                self.add(gradient, tap)
        finally:
            for handle in handles:
                handle.remove()
            for parameter, before in required.items():
                parameter.grad = None
                parameter.requires_grad_(before)
            self.bank.end()

    def tensor_taps(self, recipe: Recipe) -> Iterator[TensorTap]:
        """Every tensor that changes with a coefficient."""
        method, knobs = METHODS[recipe.method], remembered_knobs(recipe)
        recipe_inputs = RecipeInputs(recipe, self.bank)
        for name in self.bank.names:
            if name not in self.destinations:
                continue
            inputs = recipe_inputs.get(name)
            if inputs.names and inputs.base.is_floating_point():
                at = knobs(inputs.where, self.bank.layers, inputs.names)
                found = derivative_of_plan(method, at, inputs.measured)
                if self.matters(found, inputs):
                    inner = torch.zeros(found.matrix.shape[1], dtype=torch.float64, device=self.bank.device)
                    yield TensorTap(name, self.destinations[name], inputs.where, inputs.names, found, inner)
            self.bank.end()

    def matters(self, found: PlanDerivative, inputs: TensorInputs) -> bool:
        """Whether a tensor changes with a coefficient.  Where all task vectors are 0, only the base's share may."""
        if any(self.change(s, inputs.name) is not None for s in inputs.names):
            return bool(found.matrix.any())
        if isinstance(found.plan, SliceBlend):
            return bool(found.matrix[:, -found.plan.sources.shape[1] :].any())
        return isinstance(found.plan, Blend) and bool(found.matrix[:, -1].any())

    def change(self, source: str, name: str) -> LowRank | bool | None:
        """A source's task vector for a tensor: a product that is all of it, None if it is 0, True for anything else."""
        bank = self.bank
        origin, of_base = bank.layout.origin(source, name), bank.layout.origin(BASE, name)
        model = bank.models.sources[source]
        if origin is None or origin != of_base:
            return True
        if not model.may_differ(origin):
            return None
        if not isinstance(model, Adapter) or model.base is not bank.models.base:
            return True
        if (source, origin) not in self.changes:
            change = model.change_of(origin)
            assert change is not None, "an adapter that may differ changes something"
            if (
                change.low_rank is None
                or change.whole is not None
                or change.added is not None
                or change.rows is not None
            ):
                return True
            self.changes[source, origin] = change.to(bank.device)
        return self.changes[source, origin].low_rank

    def holder(self, live: Tensor) -> nn.Parameter:
        """The parameter that a destination is, or is a part of."""
        for parameter in self.parameters.get(live.untyped_storage().data_ptr(), []):
            if 0 <= live.storage_offset() - parameter.storage_offset() < parameter.numel():
                return parameter
        raise LookupError("a destination is no part of the model's parameters")

    def linear(self, tap: TensorTap, parameter: nn.Parameter) -> tuple[nn.Module, LowRankTap] | None:
        """The linear layer whose whole weight a tensor is, and its tap, if low-rank products are all that is needed.

        State-space mixers are left out: their fused kernels use a layer's weight without calling the layer.
        """
        changes = [self.change(s, self.bank.merged_as(tap.name)) for s in tap.names]
        products = [c for c in changes if isinstance(c, LowRank) and c.left.ndim == 2]
        (module, name), *others = self.owners[parameter]
        if (
            not isinstance(tap.derivative.plan, Blend)
            or tap.derivative.matrix[:, -1].any()
            or len(products) < sum(c is not None for c in changes)
            or not products
            or others
            or type(module) is not nn.Linear
            or name != "weight"
            or tap.live.shape != parameter.shape
            or tap.where.component == "mixer"
        ):
            return None
        return module, LowRankTap([c if isinstance(c, LowRank) else None for c in changes], parameter.device)

    @torch.no_grad()
    def reduce(self, recipe_inputs: RecipeInputs, parameter: Tensor, parts: list[TensorTap]) -> None:
        """Reduce a parameter's gradient for each of the tensors that it holds, and drop it."""
        whole = parameter.grad
        assert whole is not None, "a hook ran without a gradient"
        if whole.stride() != parameter.stride():
            whole = torch.empty_like(parameter, dtype=whole.dtype).copy_(whole)
        for tap in parts:
            offset = tap.live.storage_offset() - parameter.storage_offset() + whole.storage_offset()
            part = whole.as_strided(tap.live.shape, tap.live.stride(), offset)
            tap.inner += self.inner(recipe_inputs, recipe_inputs.get(tap.name), tap, part)
            self.bank.end()
        parameter.grad = None

    def inner(self, recipe_inputs: RecipeInputs, inputs: TensorInputs, tap: TensorTap, gradient: Tensor) -> Tensor:
        """The derivative by the plan's numbers, (n,), from the gradient of the merged tensor."""
        plan, bank, measured = tap.derivative.plan, self.bank, inputs.measured
        gradient = gradient.to(bank.device)
        if isinstance(plan, Blend):
            changes: list[Change] = []
            for i, source in enumerate(inputs.names):
                change = self.change(source, inputs.name)
                changes.append(measured.source(i) if change is True else change or None)
            return by_blend(gradient, inputs.base, changes, bool(tap.derivative.matrix[:, -1].any()))
        if isinstance(plan, Derived):
            sources = bank.derived(plan, inputs.name, inputs.names, inputs.statistics)
        else:
            sources = [measured.source(i) for i in range(len(inputs.names))]
        planes = inputs.planes(plan, bank.device_cache.held)
        return by_numbers(plan, gradient, Operands(inputs.base, sources, planes, inputs.keys))

    def add(self, gradient: KnobGradient, tap: TensorTap) -> None:
        """Add what one tensor says about the knobs at its layer and component."""
        layers = self.bank.layers
        found = tap.derivative.matrix @ tap.inner.cpu().numpy()
        for (knob, source), value in zip(tap.derivative.places, found, strict=True):
            by_component = gradient.values.setdefault((knob, None if source is None else tap.names[source]), {})
            values = by_component.setdefault(tap.where.finest, np.zeros(max(layers, 1)))
            values[coefficient_layer(tap.where, layers)] += value


def start_graph(module: nn.Module, args: object, output: Tensor) -> None:
    """A forward hook on the embeddings: what follows has a gradient even where no weight requires one."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)
