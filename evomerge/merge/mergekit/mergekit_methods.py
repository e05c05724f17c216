"""What mergekit 0.1.5 knows of its methods: parameters, their types and defaults, what a base model is to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scalar = bool | float
Kind = Literal["number", "integer", "boolean"]

REQUIRED = float("nan")
"""The default of a parameter that a file must give."""


@dataclass(frozen=True)
class Theirs:
    """One method of mergekit.

    base: `required`; `optional` (with one, the method works on task vectors); or `input`, a model like the others.
    each: parameters with one value per model, and their defaults.  shared: those with one for the merge.
    unused: parameters that mergekit takes but that change nothing.  models: how many besides the base.
    """

    base: Literal["required", "optional", "input"]
    each: Mapping[str, Scalar] = field(default_factory=dict)
    shared: Mapping[str, Scalar] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    models: tuple[int, int | None] = (1, None)

    @property
    def parameters(self) -> dict[str, Scalar]:
        return {**self.each, **self.shared}


def task_vectors(normalize: bool, rescale: bool, **more: float) -> Theirs:
    """The family of task arithmetic.  more: parameters of its sparsification."""
    each = {"weight": REQUIRED, "density": 1.0, **more}
    shared = {"lambda": 1.0, "normalize": normalize, "rescale": rescale}
    return Theirs("required", each, shared, UNUSED, ANY)


UNUSED = frozenset({"int8_mask"})  # the type of a temporary
ANY = (0, None)  # the base alone is left as it is
WEIGHT = {"weight": REQUIRED}
MERGEKIT: dict[str, Theirs] = {
    "linear": Theirs("input", WEIGHT, {"normalize": True}),
    "slerp": Theirs("required", {}, {"t": REQUIRED}, models=(1, 1)),
    "nuslerp": Theirs("optional", WEIGHT, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, models=(2, 2)),
    "multislerp": Theirs("optional", WEIGHT, {"normalize_weights": True, "eps": 1e-8}),
    "karcher": Theirs("input", {}, {"max_iter": 10, "tol": 1e-5}),
    "task_arithmetic": Theirs("required", WEIGHT, {"lambda": 1.0, "normalize": False}, UNUSED | {"density", "rescale"}),
    "ties": task_vectors(normalize=True, rescale=False),
    "dare_ties": task_vectors(normalize=False, rescale=True),
    "dare_linear": task_vectors(normalize=False, rescale=True),
    "della": task_vectors(normalize=True, rescale=True, epsilon=0.15),
    "della_linear": task_vectors(normalize=False, rescale=True, epsilon=0.15),
    "breadcrumbs": task_vectors(normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": task_vectors(normalize=False, rescale=False, gamma=0.01),
    "model_stock": Theirs("required", {}, {"filter_wise": False}, models=(2, None)),
    "sce": Theirs("required", {}, {"select_topk": 1.0}, UNUSED, ANY),
    "nearswap": Theirs("required", {}, {"t": REQUIRED}, models=(1, 1)),
    "arcee_fusion": Theirs("required", models=(1, 1)),
    "ram": Theirs("required", {}, {"epsilon": 1e-5}, models=ANY),
    "ramplus_tl": Theirs("required", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, models=ANY),
    "passthrough": Theirs("input", {"scale": 1.0}, models=(1, 1)),
}

KNOWN = frozenset(name for method in MERGEKIT.values() for name in (*method.parameters, *method.unused))
"""Every parameter of any method: mergekit passes over those that another method has."""

BOOLEANS = UNUSED | {
    name for method in MERGEKIT.values() for name, value in method.parameters.items() if isinstance(value, bool)
}

BOUNDS = {"density": (0.0, 1.0), "select_topk": (0.0, 1.0), "max_iter": (0.0, 1000.0)}
"""Where a parameter's results end to change: what lies beyond means the same as the bound.  (After a thousand steps
karcher has settled, or never does.)"""


def is_required(default: Scalar) -> bool:
    return math.isnan(default)


def kind(parameter: str) -> Kind:
    return "boolean" if parameter in BOOLEANS else "integer" if parameter == "max_iter" else "number"
