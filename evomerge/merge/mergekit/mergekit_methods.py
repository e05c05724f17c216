"""The methods of mergekit 0.1.5: their parameters with types and defaults, and how they use the base model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scalar = bool | float
ParameterKind = Literal["number", "integer", "boolean"]

REQUIRED = float("nan")
"""Stands for the default of a parameter that has none, so that a file must give it."""


@dataclass(frozen=True)
class MergekitMethod:
    """One method of mergekit.

    base: `required`; `optional`: with a base model the method works on task vectors; `input`: the base model is a
        model like the others.
    each: parameters with one value per model -> default.
    shared: parameters with one value for the whole merge -> default.
    unused: parameters that mergekit accepts but that change nothing.
    models: the least and the largest number of models besides the base; None for any number.
    """

    base: Literal["required", "optional", "input"]
    each: Mapping[str, Scalar] = field(default_factory=dict)
    shared: Mapping[str, Scalar] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    models: tuple[int, int | None] = (1, None)

    @property
    def parameters(self) -> dict[str, Scalar]:
        return {**self.each, **self.shared}


def task_vectors(normalize: bool, rescale: bool, **more: float) -> MergekitMethod:
    """A method on task vectors.  more: the parameters of its sparsification, and their defaults."""
    each = {"weight": REQUIRED, "density": 1.0, **more}
    shared = {"lambda": 1.0, "normalize": normalize, "rescale": rescale}
    return MergekitMethod("required", each, shared, UNUSED, ANY)


UNUSED = frozenset({"int8_mask"})  # the type of a temporary tensor
ANY = (0, None)  # without models, the result is the base
WEIGHT = {"weight": REQUIRED}
MERGEKIT: dict[str, MergekitMethod] = {
    "linear": MergekitMethod("input", WEIGHT, {"normalize": True}),
    "slerp": MergekitMethod("required", {}, {"t": REQUIRED}, models=(1, 1)),
    "nuslerp": MergekitMethod("optional", WEIGHT, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, models=(2, 2)),
    "multislerp": MergekitMethod("optional", WEIGHT, {"normalize_weights": True, "eps": 1e-8}),
    "karcher": MergekitMethod("input", {}, {"max_iter": 10, "tol": 1e-5}),
    "task_arithmetic": MergekitMethod(
        "required", WEIGHT, {"lambda": 1.0, "normalize": False}, UNUSED | {"density", "rescale"}
    ),
    "ties": task_vectors(normalize=True, rescale=False),
    "dare_ties": task_vectors(normalize=False, rescale=True),
    "dare_linear": task_vectors(normalize=False, rescale=True),
    "della": task_vectors(normalize=True, rescale=True, epsilon=0.15),
    "della_linear": task_vectors(normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": task_vectors(normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": task_vectors(normalize=False, rescale=False, gamma=0.01),
    "model_stock": MergekitMethod("required", {}, {"filter_wise": False}, models=(2, None)),
    "sce": MergekitMethod("required", {}, {"select_topk": 1.0}, UNUSED, ANY),
    "nearswap": MergekitMethod("required", {}, {"t": REQUIRED}, models=(1, 1)),
    "arcee_fusion": MergekitMethod("required", models=(1, 1)),
    "ram": MergekitMethod("required", {}, {"epsilon": 1e-5}, models=ANY),
    "ramplus_tl": MergekitMethod("required", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, models=ANY),
    "passthrough": MergekitMethod("input", {"scale": 1.0}, models=(1, 1)),
}

KNOWN_PARAMETERS = frozenset(name for method in MERGEKIT.values() for name in (*method.parameters, *method.unused))
"""Every parameter of any method.  mergekit ignores a parameter that only another method has."""

BOOLEANS = UNUSED | {
    name for method in MERGEKIT.values() for name, value in method.parameters.items() if isinstance(value, bool)
}

BOUNDS = {"density": (0.0, 1.0), "select_topk": (0.0, 1.0), "max_iter": (0.0, 1000.0)}
"""The range of a parameter; values beyond it have the same effect as the bound.  (karcher converges within a thousand
steps, or not at all.)"""


def is_required(default: Scalar) -> bool:
    """Whether a default says that a file must give the parameter."""
    return math.isnan(default)


def parameter_kind(parameter: str) -> ParameterKind:
    """The type of a parameter's values."""
    return "boolean" if parameter in BOOLEANS else "integer" if parameter == "max_iter" else "number"
