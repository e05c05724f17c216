"""From a recipe to a mergekit file of the same merge, with notes on where mergekit does something else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.coefficient_from_values import shortest_coefficient
from evomerge.merge.mergekit.mergekit_methods import MERGEKIT, MergekitMethod
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import Coefficient, filtered_values, numbers_and_lists, value_at
from evomerge.merge.recipe.recipe import Recipe, RecipeSource
from evomerge.sources.locate import folder_of_card
from evomerge.sources.open_models import stored_tensors
from evomerge.sources.tensor_names import layer_count, name_in_layer, tensor_role

# Parts of names that tell the components apart; norms before attention, because names of norms may contain `attention`.
COMPONENT_FILTERS = """
    lm_head embed_out embed_tokens embed_in wte wpe norm ln_ self_attn attention attn mlp feed_forward ffn
    block_sparse_moe moe
""".split()
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass(frozen=True)
class OutputRun:
    """Consecutive layers of the output that are made of the same models.

    tensors: their names in the output, with the tensors outside the layers that belong to this run.
    first: the first of these layers in the output.  length: their number.
    ranges: model (`base`, or a source's name) -> (first layer, end) in that model.
    """

    tensors: list[str]
    first: int
    length: int
    ranges: dict[str, tuple[int, int]]

    def name_in(self, model: str, tensor: str) -> str:
        """The name of an output tensor in a model."""
        layer = tensor_role(tensor).layer
        return tensor if layer is None else name_in_layer(tensor, layer - self.first + self.ranges[model][0])


def dump_mergekit(recipe: Recipe) -> tuple[str, list[str]]:
    """The recipe as a mergekit file (YAML), and notes on where mergekit does something else.

    Where mergekit's method takes fewer models, the file has several documents, for `mergekit-multi`.

    The notes are comments in the file too.  Lists become gradients with a value for each layer, components become
    filters.  EvomergeError lists what mergekit cannot express.
    """
    if recipe.method not in MERGEKIT:
        raise EvomergeError(f"mergekit has no method {recipe.method!r}; it has {', '.join(MERGEKIT)}")
    if nested := [s.name for s in recipe.sources if s.recipe]:
        raise EvomergeError(f"mergekit cannot merge merges: {nested[0]} has a recipe of its own; merge it first")
    if recipe.keep:
        raise EvomergeError(f"mergekit cannot leave components at the base; this recipe keeps {', '.join(recipe.keep)}")
    method, problems = MERGEKIT[recipe.method], []
    names = list(stored_tensors(recipe.base.path))
    runs = output_runs(recipe, names)
    layers = sum(run.length for run in runs)
    base: str | None = recipe.base.path
    sources = list(recipe.sources)
    if recipe.method == "slerp" and len(sources) > 1:
        base, sources = sources[0].path, sources[1:]
    most = method.models[1] if METHODS[recipe.method].ordered is not None else None
    in_steps = most is not None and len(sources) > most
    if in_steps and (recipe.method == "nuslerp" or recipe.slices or recipe.vocabulary):
        more = " with `slices`" if recipe.slices else " with a `vocabulary`" if recipe.vocabulary else ""
        raise EvomergeError(
            f"mergekit's {recipe.method} merges two models, and this recipe merges {len(recipe.sources)} sources{more} "
            "one after the other"
        )
    if method.base == "optional" and not uses_task_vectors(recipe):
        base = None
    content: dict[str, Any] = {"merge_method": recipe.method}
    if base is not None:
        content["base_model"] = base
    per_run = [run_content(recipe, method, run, layers, base, sources) for run in runs]
    if method.base == "input" or recipe.slices:  # in `models`, mergekit's base model is always an input
        content["slices"] = per_run
    else:
        content["models"] = [{k: v for k, v in s.items() if k != "layer_range"} for s in per_run[0]["sources"]]
        content["models"] = [m for m in content["models"] if m["model"] != base]
        content["parameters"] = per_run[0].get("parameters", {})
    content |= {"dtype": "float32", "out_dtype": recipe.dtype, "chat_template": recipe.chat_template}
    content["tokenizer_source"] = {s.name: s.path for s in sources}.get(recipe.vocabulary or "", recipe.vocabulary)
    problems += missing_knobs(recipe, method)
    if problems:
        raise EvomergeError("mergekit cannot make this merge:\n  " + "\n  ".join(problems))
    notes = difference_notes(recipe, base)
    head = "".join(f"# {note}\n" for note in ["A recipe of evomerge.", *notes])
    documents = steps(content) if in_steps else [content]
    texts = [
        yaml.safe_dump(
            {k: v for k, v in document.items() if v not in ({}, None)},
            sort_keys=False,
            default_flow_style=None,
            width=110,
        )
        for document in documents
    ]
    return head + "---\n".join(texts), notes


def steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents for `mergekit-multi` that merge the models of a file one after the other into its base model."""
    found: list[dict[str, Any]] = []
    *earlier, last = content["models"]
    base = content["base_model"]
    for number, model in enumerate(earlier, 1):
        own = {"name": f"step{number}", "merge_method": content["merge_method"], "base_model": base, "models": [model]}
        found.append(own | {"parameters": content["parameters"], "dtype": "float32"})
        base = own["name"]
    return [*found, content | {"base_model": base, "models": [last]}]


def output_runs(recipe: Recipe, names: list[str]) -> list[OutputRun]:
    """The slices of a recipe, or one run of whole models.  names: the tensors of the base."""
    models, layers = ["base", *(s.name for s in recipe.sources)], layer_count(names)
    slices = [part.layers for part in recipe.slices] or [dict.fromkeys(models, (0, layers))]
    runs: list[OutputRun] = []
    for number, ranges in enumerate(slices):
        start, end = next(iter(ranges.values()))
        done = runs[-1].first + runs[-1].length if runs else 0
        tensors = [name_in_layer(n, done + i) for i in range(end - start) for n in names if tensor_role(n).layer == 0]
        for name in names:
            if tensor_role(name).layer is None:
                ends = 0 if tensor_role(name).component == "embedding" else len(slices) - 1
                tensors += [name] * (number == ends)
        runs.append(OutputRun(tensors, done, end - start, dict(ranges)))
    return runs


def run_content(
    recipe: Recipe, method: MergekitMethod, run: OutputRun, layers: int, base: str | None, sources: list[RecipeSource]
) -> dict[str, Any]:
    """One slice of the file: its models with their parameters, and the parameters that they share."""
    found: dict[str, Any] = {"sources": []}
    takes_base = method.base != "input" and base is not None
    if takes_base and "base" in run.ranges:
        found["sources"].append({"model": base, "layer_range": list(run.ranges["base"])})
    for source in sources:
        if source.name in run.ranges:
            own = {
                k: mergekit_value(recipe, k, source, run, layers)
                for k in method.each
                if k in METHODS[recipe.method].knobs
            }
            model = {"model": model_reference(source, recipe.base.path), "layer_range": list(run.ranges[source.name])}
            found["sources"].append(model | ({"parameters": own} if own else {}))
    shared = {
        k: mergekit_value(recipe, k, None, run, layers) for k in method.shared if k in METHODS[recipe.method].knobs
    }
    return found | ({"parameters": shared} if shared else {})


def given_value(recipe: Recipe, knob: str, source: RecipeSource | None) -> Coefficient:
    """The value of a knob in a recipe, or the knob's default.  source: for knobs with one value per source."""
    found = recipe.parameters.get(knob, METHODS[recipe.method].knobs[knob].default)
    if source is not None:
        found = source.parameters.get(knob, found)
    assert found is not None, "a required knob was not checked"
    return found


def mergekit_value(recipe: Recipe, knob: str, source: RecipeSource | None, run: OutputRun, layers: int) -> Any:
    """A knob's value in mergekit's format: a number, a gradient, or a list of `{filter, value}`."""
    ours = given_value(recipe, knob, source)
    choices = METHODS[recipe.method].knobs[knob].choices
    if isinstance(ours, str):
        ours = choices[ours]
    # mergekit looks up a parameter of one model by that model's tensor names, and one of all models by the output's.
    first = run.first if source is None else run.ranges[source.name][0]
    lookup_name = (lambda n: n) if source is None else (lambda n: run.name_in(source.name, n))
    values = {lookup_name(name): value_at(ours, tensor_role(name), layers) for name in run.tensors}
    filters = [entry.filter for entry in filtered_values(ours) if entry.filter]
    if isinstance(ours, dict):
        filters = [f for f in COMPONENT_FILTERS if any(f in name for name in values)]
    # mergekit gives tensors outside the layers the first value of a gradient.
    found = shortest_coefficient(values, filters, run.length, lambda role, _: (role.layer or first) - first)
    if (METHODS[recipe.method].knobs[knob].switch or choices) and not isinstance(found, (list, dict, str)):
        return bool(found)
    if entries := filtered_values(found):
        return [entry.model_dump(exclude_none=True) for entry in entries]
    return found


def uses_task_vectors(recipe: Recipe) -> bool:
    """Whether the method works on task vectors; only for methods with the knob `task_vectors`."""
    return bool(given_value(recipe, "task_vectors", None))


def model_reference(source: RecipeSource, base: str) -> Any:
    """A source in mergekit's format; an adapter is written as one on the base."""
    folder = folder_of_card(source.path)
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    model, lora = (base, source.path) if is_adapter else (source.path, None)
    if any("+" in path for path in (model, lora or "")):
        return {"model": {"path": model}} | ({"lora": {"path": lora}} if lora else {})
    return f"{model}+{lora}" if lora else model


def missing_knobs(recipe: Recipe, method: MergekitMethod) -> list[str]:
    """The knobs that mergekit does not have and whose values are not their defaults, a line each."""
    problems = []
    for name, knob in METHODS[recipe.method].knobs.items():
        if name in method.parameters or name == "task_vectors":
            continue
        for source in recipe.sources if knob.each else [None]:
            value = given_value(recipe, name, source)
            if any(part != knob.default for part in numbers_and_lists(value)):
                problems.append(f"{name}: mergekit's {recipe.method} has no such parameter")
                break
    return problems


def difference_notes(recipe: Recipe, base: str | None) -> list[str]:
    """Notes on where mergekit's result differs from that of the recipe.  base: mergekit's `base_model`."""
    notes = []
    if recipe.method in RANDOM:
        notes.append(f"mergekit draws other random masks than seed {recipe.seed} gives here.")
        if given_value(recipe, "rescale", None) in ("expected", 1.0, True):
            notes.append("mergekit restores the L1 norm of what it masks, here its expectation is restored.")
    if base is None:
        notes.append("mergekit takes the configuration and the tokenizer from one of the models.")
    elif base != recipe.base.path:
        notes.append(f"mergekit takes the configuration and the tokenizer from {Path(base).name}.")
    return notes
