"""Configurations of mergekit that both programs merge: every method with the knobs that tell it from its neighbours,
and every way to write coefficients.  <base>, <one>, ... stand for the models' paths."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """units: how far float32 results may be apart, in units in the last place of the largest number in the sum; 0
    where both programs add and multiply in the same order.  bfloat16 results may be one unit apart if this is not 0.

    arithmetic: mergekit's `dtype`.  float64 stands where its float32 alone is off by several units, because it finds
    angles and lengths in float32: so evomerge is compared with the exact result.

    cuts: shares of the largest task-vector elements, of every source, at which a trim begins or ends.  Of elements as
    large as the one there mergekit takes some and evomerge all, so they are left out of the comparison.
    """

    config: dict[str, Any]
    units: float = 0
    cuts: tuple[float, ...] = ()
    arithmetic: str = "float32"


def models(*weights: float | list[Any], **more: list[Any]) -> list[dict[str, Any]]:
    """<one>, <two>, ... with these weights; more: parameter -> its value for each."""
    found = []
    for i, weight in enumerate(weights):
        parameters = {"weight": weight} | {name: values[i] for name, values in more.items()}
        found.append({"model": f"<{('one', 'two', 'three')[i]}>", "parameters": parameters})
    return found


def plain(*names: str) -> list[dict[str, Any]]:
    return [{"model": f"<{name}>"} for name in names]


def of_base(method: str, inputs: list[dict[str, Any]], **parameters: Any) -> Case:
    """A merge on a base model, which is not listed among the models."""
    return among(method, inputs, base_model="<base>", **parameters)


def among(
    method: str,
    inputs: list[dict[str, Any]],
    units: float = 0,
    cuts: tuple[float, ...] = (),
    base_model: str | None = None,
    **parameters: Any,
) -> Case:
    """A merge of the inputs."""
    content: dict[str, Any] = {"merge_method": method, "models": inputs}
    if base_model:
        content["base_model"] = base_model
    if parameters:
        content["parameters"] = parameters
    return Case(content, units, cuts, "float64" if method in BY_ANGLES else "float32")


def ends(*names: str) -> list[dict[str, Any]]:
    """A slice of the first three layers and one of the last two, which share a layer."""
    sources = [[{"model": f"<{n}>", "layer_range": r} for n in names] for r in ([0, 3], [2, 4])]
    return [{"sources": s} for s in sources]


BY_ANGLES = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
BY_NAME = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]

CASES: dict[str, Case] = {
    "linear": among("linear", models(0.3, 0.9, 0.4), units=3),
    "linear, not normalised": among("linear", models(0.3, 0.9), units=1, normalize=False),
    "linear, with a base": among("linear", [*models(0.3), {"model": "<base>", "parameters": {"weight": 0.7}}], units=1),
    "linear, the base not listed": Case(
        {"merge_method": "linear", "base_model": "<base>", "models": models(0.3), "parameters": {"weight": 0.5}},
        units=2,
    ),
    "slerp": of_base("slerp", plain("base", "one"), units=3, t=0.3),
    "slerp, the base last": of_base("slerp", plain("one", "base"), units=3, t=0.3),
    "slerp, by names and layers": of_base("slerp", plain("base", "one"), units=3, t=BY_NAME),
    "slerp, parallel": of_base("slerp", plain("base", "one"), units=3, t=[0, 1]),
    "nuslerp": among("nuslerp", models(0.3, 0.9), units=3),
    "nuslerp, task vectors": of_base("nuslerp", models(0.3, 0.9), units=3),
    "nuslerp, rows": of_base("nuslerp", models(0.3, 0.9), units=3, nuslerp_flatten=False),
    "nuslerp, columns": among("nuslerp", models(0.3, 0.9), units=3, nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": among("multislerp", models(0.3, 0.9, 0.5), units=3),
    "multislerp, task vectors": of_base("multislerp", models(0.3, 0.9, 0.5), units=3),
    "multislerp, not normalised": of_base("multislerp", models(0.3, 0.9), units=3, normalize_weights=False),
    "karcher": among("karcher", plain("one", "two", "three"), units=3),
    "karcher, one step": among("karcher", plain("one", "two", "base"), units=3, max_iter=1, tol=1e-6),
    "task_arithmetic": of_base("task_arithmetic", models(0.4, -0.2), units=2, **{"lambda": 1.3}),
    "task_arithmetic, normalised": of_base("task_arithmetic", models(0.4, 0.7), units=2, normalize=True),
    "task_arithmetic, by layers": of_base("task_arithmetic", models([0, 0.5, 1], [1, "2e-1"])),
    "ties": of_base("ties", models(0.4, 0.7)),
    "ties, trimmed": of_base("ties", models(0.4, 0.7, density=[0.5, 0.3]), cuts=(0.3, 0.5)),
    "ties, not normalised": of_base(
        "ties", models(0.4, 0.7), cuts=(0.5,), density=0.5, normalize=False, **{"lambda": 0.8}
    ),
    "ties, a negative weight": of_base("ties", models(0.7, -0.4), cuts=(0.5,), density=0.5),
    "breadcrumbs": of_base("breadcrumbs", models(0.4, 0.7), cuts=(0.05, 0.65), density=0.6, gamma=0.05),
    "breadcrumbs_ties": of_base("breadcrumbs_ties", models(0.4, 0.7, 0.2), cuts=(0.05, 0.65), density=0.6, gamma=0.05),
    "model_stock": of_base("model_stock", plain("one", "two", "three"), units=3),
    "model_stock, filters": of_base("model_stock", plain("one", "two"), units=3, filter_wise=True),
    "sce": of_base("sce", plain("one", "two", "three"), units=2),
    "sce, selected": of_base("sce", plain("one", "two", "three"), units=2, select_topk=0.3),
    "nearswap": of_base("nearswap", plain("base", "one"), units=2, t=0.03),
    "arcee_fusion": of_base("arcee_fusion", plain("base", "one")),
    "ram": of_base("ram", plain("one", "two"), epsilon=0.05),
    "ramplus_tl": of_base("ramplus_tl", plain("one", "two", "three"), units=2, epsilon=0.05, r=0.4, alpha=0.3),
    "passthrough": among("passthrough", plain("one")),
    "passthrough, scaled": among("passthrough", [{"model": "<one>", "parameters": {"scale": [0.5, 1]}}]),
    # Coefficients at every level: the model's own before the merge's, and what no filter fits falls through.
    "precedence": Case(
        {
            "merge_method": "task_arithmetic",
            "base_model": "<base>",
            "models": [
                {"model": "<one>", "parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}]}},
                {"model": "<base>", "parameters": {"weight": 7}},
                {"model": "<two>"},
            ],
            "parameters": {"weight": [{"filter": "embed", "value": 0.8}, {"filter": "*", "value": [0.2, 0.4, 0.3]}]},
        }
    ),
    "names outside the stack": of_base(
        "task_arithmetic", models([{"filter": "norm", "value": [0.3, 0.8]}, {"value": [1, 0]}], 0.5)
    ),
    "slices": Case(
        {
            "merge_method": "task_arithmetic",
            "base_model": "<base>",
            "slices": [
                {
                    "sources": [
                        {"model": "<base>", "layer_range": [0, 3]},
                        {"model": "<one>", "layer_range": [0, 3], "parameters": {"weight": [0.1, 0.5]}},
                    ]
                },
                {
                    "sources": [
                        {"model": "<two>", "layer_range": [2, 4], "parameters": {"weight": 0.3}},
                        {"model": "<one>", "layer_range": [1, 3]},
                        {"model": "<base>", "layer_range": [2, 4]},
                    ],
                    "parameters": {"weight": [{"filter": "mlp", "value": [0.9, 0.8]}]},
                },
                {
                    "sources": [
                        {"model": "<base>", "layer_range": [3, 4]},
                        {"model": "<two>", "layer_range": [3, 4], "parameters": {"weight": [0.2, 0.6]}},
                    ]
                },
            ],
            "parameters": {"weight": [{"filter": "layers.1.", "value": 0.7}, {"value": 0.4}]},
        }
    ),
    "slices passed through": Case({"merge_method": "passthrough", "slices": ends("one")[:1] + ends("two")[1:]}),
    "ram, three models": of_base("ram", plain("one", "two", "three"), units=2),
    "ties, nothing of one model": of_base("ties", models(0.4, 0.7, density=[0, "5e-1"]), cuts=(0.5,)),
    "slices of no layer at the ends": Case(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": f"<{name}>", "layer_range": layers}]}
                for name, layers in (
                    ("two", [0, 0]),
                    ("one", [0, 3]),
                    ("base", [1, 1]),
                    ("two", [3, 4]),
                    ("base", [4, 4]),
                )
            ],
        }
    ),
    "other ways to say it": Case(
        {
            "x-common": {"weight": ["0.5"]},
            "name": "mine",
            "merge_method": "ties",
            "base_model": {"model": "<base>", "override_architecture": None},
            "models": [
                {"model": {"model": {"path": "<one>", "revision": "main"}}, "note": 1, "parameters": {"weight": []}},
                {"model": "<two>@main", "parameters": {"weight": {"filter": "", "value": "3e-1"}}},
            ],
            "parameters": {"weight": 0.6, "normalize": "off", "int8_mask": "true", "density": 2, "embed_slerp": True},
            "modules": {},
            "chat_template": "",
        }
    ),
    "one module": Case(
        {
            "merge_method": "linear",
            "modules": {"default": {"models": models([0, 1], 0.5), "parameters": {"normalize": False}}},
            "parameters": {"normalize": True},
        }
    ),
}

# A random mask of each method: the kept share and the norm of what is left are mergekit's.
RANDOM: dict[str, Case] = {
    method: of_base(method, models(1.0), density=0.6, **({"epsilon": 0.2} if "della" in method else {}))
    for method in ("dare_linear", "dare_ties", "della_linear", "della")
}

# <base> and <one> here have tokenizers of their own; rows are compared by token.
VOCABULARIES: dict[str, Case] = {
    name: Case(
        {"merge_method": method, "base_model": "<base>", "models": inputs, "parameters": parameters}
        | ({"tokenizer": {"source": wanted}} if wanted == "union" else {"tokenizer_source": wanted}),
        units=units,
    )
    for name, wanted, method, inputs, parameters, units in (
        ("a union", "union", "task_arithmetic", models(0.5, 0.25), {}, 0),
        ("the base's", "base", "linear", models(0.5, 0.25), {"weight": 0.25, "normalize": False}, 1),
        ("a source's", "<one>", "ties", models(0.5, 0.25), {"density": 0.5}, 0),
    )
}

# The bfloat16 files again with `dtype: bfloat16`, in which mergekit then computes: how far it is from what is computed
# in float32 and rounded once, in units, and which share of the elements may be farther.  These are the elements of
# which another part is kept, or whose elected sign is the other one, because bfloat16 makes magnitudes equal or sums 0.
ROUNDED: dict[str, tuple[float, float]] = {
    "linear": (1, 0),
    "slerp": (1, 0),
    "passthrough, scaled": (1, 0),
    "task_arithmetic": (3, 0),
    "nearswap": (3, 0),
    "nuslerp": (4, 0),
    "nuslerp, task vectors": (4, 0),
    "multislerp": (4, 0),
    "multislerp, task vectors": (4, 0),
    "model_stock": (4, 0),
    "karcher": (10, 0),
    "ties": (3, 0.03),
    "ties, trimmed": (3, 0.03),
    "breadcrumbs": (3, 0.03),
    "sce": (3, 0.03),
    "ram": (3, 0.03),
    "ramplus_tl": (3, 0.03),
    "arcee_fusion": (3, 0.1),
}

DOCUMENTS = """
name: first
merge_method: linear
models: [{model: <one>}, {model: <two>}]
parameters: {weight: 0.5}
dtype: float32
out_dtype: bfloat16
---
name: second
merge_method: task_arithmetic
base_model: <base>
models: [{model: first, parameters: {weight: 0.7}}, {model: <one>+<lora>, parameters: {weight: 0.2}}]
dtype: float32
---
merge_method: slerp
base_model: second
models: [{model: first}]
parameters: {t: [0.3, 0.6]}
dtype: float64
out_dtype: float32
"""
"""For mergekit-multi: merges of merges, one rounded to bfloat16, one with an adapter on a model that is no base."""

STEPS = {
    "slerp": """
name: first
merge_method: slerp
base_model: <one>
models: [{model: <two>}]
parameters: {t: 0.3}
dtype: float64
out_dtype: float32
---
merge_method: slerp
base_model: first
models: [{model: <three>}]
parameters: {t: 0.3}
dtype: float64
out_dtype: float32
""",
    "nuslerp": """
name: first
merge_method: nuslerp
base_model: <base>
models: [{model: <one>, parameters: {weight: 0.25}}, {model: <two>, parameters: {weight: 0.5}}]
dtype: float64
out_dtype: float32
---
merge_method: nuslerp
base_model: <base>
models: [{model: first, parameters: {weight: 0.75}}, {model: <three>, parameters: {weight: 0.375}}]
dtype: float64
out_dtype: float32
""",
    "nearswap": """
name: first
merge_method: nearswap
base_model: <base>
models: [{model: <one>}]
parameters: {t: 0.01}
dtype: float32
---
merge_method: nearswap
base_model: first
models: [{model: <two>}]
parameters: {t: 0.01}
dtype: float32
""",
    "arcee_fusion": """
name: first
merge_method: arcee_fusion
base_model: <base>
models: [{model: <one>}]
dtype: float32
---
merge_method: arcee_fusion
base_model: first
models: [{model: <two>}]
dtype: float32
""",
}
"""For mergekit-multi: what a recipe of several sources does at once."""

STEPS_HERE: dict[str, tuple[tuple[str, ...], dict[str, float], dict[str, float]]] = {
    "slerp": (("one", "two", "three"), {"t": 0.3}, {}),
    "nuslerp": (("one", "two", "three"), {}, {"one": 0.25, "two": 0.5, "three": 0.375}),
    "nearswap": (("one", "two"), {"t": 0.01}, {}),
    "arcee_fusion": (("one", "two"), {}, {}),
}
"""The same as recipes: sources, parameters of all, weights."""

ADAPTER = of_base("task_arithmetic", [{"model": "<base>+<lora>", "parameters": {"weight": 0.5}}])

# These run on the other architectures too.
ELSEWHERE = ["linear", "slerp, by names and layers", "ties", "precedence"]
