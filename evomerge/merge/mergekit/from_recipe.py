"""From a recipe to a mergekit file that means the same, and what mergekit cannot say of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.coefficient_from_values import coefficient
from evomerge.merge.mergekit.mergekit_methods import MERGEKIT, Theirs
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import Coefficient, filtered_values, numbers_and_lists, value_at
from evomerge.merge.recipe.recipe import Recipe, RecipeSource
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.locate import locate
from evomerge.sources.tensor_names import layer_count, name_in_layer, tensor_role

# Parts of names that tell the components apart; norms before attention, of which some names speak too.
COMPONENT_FILTERS = """
    lm_head embed_out embed_tokens embed_in wte wpe norm ln_ self_attn attention attn mlp feed_forward ffn
    block_sparse_moe moe
""".split()
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass(frozen=True)
class OutputRun:
    """Consecutive layers of the output, of every model that takes part there.

    tensors: their names in the output, those outside the stack that belong here included.  first: the output's layer
    that comes first.  ranges: model -> (first layer, end) in that model; `base` is the base.
    """

    tensors: list[str]
    first: int
    length: int
    ranges: dict[str, tuple[int, int]]

    def name_in(self, model: str, tensor: str) -> str:
        """What an output tensor is called in a model."""
        layer = tensor_role(tensor).layer
        return tensor if layer is None else name_in_layer(tensor, layer - self.first + self.ranges[model][0])


def dump_mergekit(recipe: Recipe) -> tuple[str, list[str]]:
    """A mergekit file (YAML) and notes on where it means less than the recipe; the notes stand in the file too.

    Lists become gradients with a knot for each layer, components become filters.  EvomergeError lists what mergekit
    has no words for.
    """
    if recipe.method not in MERGEKIT:
        raise EvomergeError(f"mergekit has no method {recipe.method!r}; it has {', '.join(MERGEKIT)}")
    if nested := [s.name for s in recipe.sources if s.recipe]:
        raise EvomergeError(f"mergekit cannot merge merges: {nested[0]} has a recipe of its own; merge it first")
    theirs, problems = MERGEKIT[recipe.method], []
    names = list(open_checkpoint(locate(recipe.base.path)).tensors)
    runs = output_runs(recipe, names)
    layers = sum(run.length for run in runs)
    base: str | None = recipe.base.path
    sources = list(recipe.sources)
    if recipe.method == "slerp" and len(sources) == 2:
        base, sources = sources[0].path, sources[1:]
    if theirs.base == "optional" and not changes(recipe):
        base = None
    content: dict[str, Any] = {"merge_method": recipe.method}
    if base is not None:
        content["base_model"] = base
    per_run = [run_content(recipe, theirs, run, layers, base, sources) for run in runs]
    if theirs.base == "input" or recipe.slices:  # only with slices may mergekit's base model be no input
        content["slices"] = per_run
    else:
        content["models"] = [{k: v for k, v in s.items() if k != "layer_range"} for s in per_run[0]["sources"]]
        content["models"] = [m for m in content["models"] if m["model"] != base]
        content["parameters"] = per_run[0].get("parameters", {})
    content |= {"dtype": "float32", "out_dtype": recipe.dtype, "chat_template": recipe.chat_template}
    content["tokenizer_source"] = {s.name: s.path for s in sources}.get(recipe.vocabulary or "", recipe.vocabulary)
    problems += unsaid(recipe, theirs)
    if problems:
        raise EvomergeError("mergekit cannot make this merge:\n  " + "\n  ".join(problems))
    notes = differences(recipe, base)
    head = "".join(f"# {note}\n" for note in ["A recipe of evomerge.", *notes])
    text: str = yaml.safe_dump(
        {k: v for k, v in content.items() if v not in ({}, None)}, sort_keys=False, default_flow_style=None, width=110
    )
    return head + text, notes


def output_runs(recipe: Recipe, names: list[str]) -> list[OutputRun]:
    """The slices of a recipe, or one of whole models.  names: the base's tensors."""
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
    recipe: Recipe, theirs: Theirs, run: OutputRun, layers: int, base: str | None, sources: list[RecipeSource]
) -> dict[str, Any]:
    """A slice: its models with their parameters, and the parameters that they share."""
    found: dict[str, Any] = {"sources": []}
    takes_base = theirs.base != "input" and base is not None
    if takes_base and "base" in run.ranges:
        found["sources"].append({"model": base, "layer_range": list(run.ranges["base"])})
    for source in sources:
        if source.name in run.ranges:
            own = {k: setting(recipe, k, source, run, layers) for k in theirs.each if k in METHODS[recipe.method].knobs}
            model = {"model": reference(source, recipe.base.path), "layer_range": list(run.ranges[source.name])}
            found["sources"].append(model | ({"parameters": own} if own else {}))
    shared = {k: setting(recipe, k, None, run, layers) for k in theirs.shared if k in METHODS[recipe.method].knobs}
    return found | ({"parameters": shared} if shared else {})


def given(recipe: Recipe, knob: str, source: RecipeSource | None) -> Coefficient:
    """What a recipe says of a knob, or the knob's default."""
    found = recipe.parameters.get(knob, METHODS[recipe.method].knobs[knob].default)
    if source is not None:
        found = source.parameters.get(knob, found)
    assert found is not None, "a required knob was not checked"
    return found


def setting(recipe: Recipe, knob: str, source: RecipeSource | None, run: OutputRun, layers: int) -> Any:
    """A knob as mergekit writes it: a number, a gradient, or a list of `{filter, value}`."""
    ours = given(recipe, knob, source)
    choices = METHODS[recipe.method].knobs[knob].choices
    if isinstance(ours, str):
        ours = choices[ours]
    # A parameter of one model is looked up by that model's own tensor names, one of all models by the output's.
    first = run.first if source is None else run.ranges[source.name][0]
    called = (lambda n: n) if source is None else (lambda n: run.name_in(source.name, n))
    values = {called(name): value_at(ours, tensor_role(name), layers) for name in run.tensors}
    filters = [part.filter for part in filtered_values(ours) if part.filter]
    if isinstance(ours, dict):
        filters = [f for f in COMPONENT_FILTERS if any(f in name for name in values)]
    # mergekit gives what is outside the stack a gradient's first value.
    found = coefficient(values, filters, run.length, lambda where, _: (where.layer or first) - first)
    if (METHODS[recipe.method].knobs[knob].switch or choices) and not isinstance(found, (list, dict, str)):
        return bool(found)
    if parts := filtered_values(found):
        return [part.model_dump(exclude_none=True) for part in parts]
    return found


def changes(recipe: Recipe) -> bool:
    """Whether the method works on task vectors (a recipe can say so for methods that need no base)."""
    return bool(given(recipe, "task_vectors", None))


def reference(source: RecipeSource, base: str) -> Any:
    """A model as mergekit writes it; an adapter is one on the base."""
    folder = locate(source.path)
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    model, lora = (base, source.path) if is_adapter else (source.path, None)
    if any("+" in path for path in (model, lora or "")):
        return {"model": {"path": model}} | ({"lora": {"path": lora}} if lora else {})
    return f"{model}+{lora}" if lora else model


def unsaid(recipe: Recipe, theirs: Theirs) -> list[str]:
    """Knobs that mergekit does not have and that are not at their defaults."""
    problems = []
    for name, knob in METHODS[recipe.method].knobs.items():
        if name in theirs.parameters or name == "task_vectors":
            continue
        for source in recipe.sources if knob.each else [None]:
            value = given(recipe, name, source)
            if any(part != knob.default for part in numbers_and_lists(value)):
                problems.append(f"{name}: mergekit's {recipe.method} has no such parameter")
                break
    return problems


def differences(recipe: Recipe, base: str | None) -> list[str]:
    """Where mergekit makes of the file something else than the recipe."""
    notes = []
    if recipe.method in RANDOM:
        notes.append(f"mergekit draws other random masks than seed {recipe.seed} gives here.")
        if given(recipe, "rescale", None) in ("expected", 1.0, True):
            notes.append("mergekit restores the L1 norm of what it masks, here its expectation is restored.")
    if base is None:
        notes.append("mergekit takes the configuration and the tokenizer from one of the models.")
    elif base != recipe.base.path:
        notes.append(f"mergekit takes the configuration and the tokenizer from {Path(base).name}.")
    return notes
