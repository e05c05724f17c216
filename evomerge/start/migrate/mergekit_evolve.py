"""What a file of mergekit-evolve means here.  Compared with mergekit 0.1.5, `mergekit/evo`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, did_you_mean
from evomerge.files.read import read_json
from evomerge.merge.mergekit.mergekit_file import ModelReference
from evomerge.merge.mergekit.parse_mergekit import read_scalar, short_repr
from evomerge.sources.locate import looks_like_hub_id
from evomerge.start.migrate.draft import Draft, source_names, study_name
from evomerge.start.yaml_text import plain

PROGRAM = "mergekit-evolve"
MARKS = {"genome"}
TOP = """genome tasks limit num_fewshot shuffle random_init apply_chat_template fewshot_as_multiturn""".split()
GENOME = """models merge_method base_model tokenizer_source layer_granularity normalize allow_negative_weights filters
    smooth""".split()
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
NORMALISED = ("linear", "ties", "dare_ties")  # by default
FILTERS = {
    "attention": "self_attn attn attention self_attention",
    "mlp": "mlp feed_forward ffn block_sparse_moe experts",
    "norm": "norm layernorm input_layernorm post_attention_layernorm ln_1 ln_2",
    "embedding": "embed embed_tokens wte",
    "head": "lm_head embed_out",
    "attention.q": "q_proj self_attn.q_proj",
    "attention.k": "k_proj self_attn.k_proj",
    "attention.v": "v_proj self_attn.v_proj",
    "attention.o": "o_proj self_attn.o_proj",
    "mlp.gate": "gate_proj mlp.gate_proj",
    "mlp.up": "up_proj mlp.up_proj",
    "mlp.down": "down_proj mlp.down_proj",
}
"""Component -> the texts in tensor names that filter its tensors."""
COMPONENT_OF = {text: component for component, texts in FILTERS.items() for text in texts.split()}
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Genome:
    """The models and the method of a file.

    base: of the configuration.  sources: name -> model.  method: of METHODS.
    """

    base: str
    sources: dict[str, ModelReference]
    method: str


def write(content: dict[str, Any], draft: Draft) -> None:
    """Write the lines of the configuration for a file's content; problems are collected in the draft."""
    top = draft.mapping("", content, TOP)
    given = draft.mapping("genome", top.get("genome"), GENOME)
    draft.add(f"name: {plain(study_name(draft.old.stem))}")
    genome = write_models(given, draft)
    if genome is not None:
        write_space(given, genome, draft)
    write_tasks(top, draft)
    draft.add("budget: {trials: 100}", "--max-fevals, whose default is 100; or a time: {timeout: 8h}")
    draft.add("seed: 0", "--random-seed; splits and sampler are seeded too, so that a search can be repeated")
    draft.add("dtype: bfloat16")
    if draft.switch("random_init", top.get("random_init"), False):
        draft.leave_out("random_init: true", "the search begins at the best of base, models and usual recipes")
    if draft.switch("shuffle", top.get("shuffle"), False):
        draft.leave_out("shuffle: true", "items are always drawn at random, once, the same for every candidate")


def write_models(given: dict[str, Any], draft: Draft) -> Genome | None:
    """Write base, sources, method and vocabulary; None after a problem."""
    method = given.get("merge_method")
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS) or f"; it has {', '.join(METHODS)}"
        fault = "missing" if method is None else f"mergekit-evolve has no {short_repr(method)}"
        draft.add_problem("genome.merge_method", f"{fault}{hint}")
        return None
    models = draft.read_list("genome.models", given.get("models"), draft.reference)
    base = draft.reference("genome.base_model", given["base_model"]) if given.get("base_model") else None
    if base is not None and base.lora is not None:
        draft.add_problem("genome.base_model", "an adapter cannot be the base; merge it into a checkpoint first")
    if base is None and method not in ("linear", "slerp"):
        draft.add_problem("genome.base_model", f"missing; {method} needs it")
    if draft.problems or not models:
        return None
    others, about_base, about_sources = list(models), [], []
    if base is None:
        base = models[0]
        about_base.append(f"the file has none; the first model gives configuration and tokenizer of a {method} merge")
        if base.lora is not None:
            draft.add_problem("genome.models.0", "the base of the merge cannot be an adapter; name another model first")
    if base in others and method != "linear":
        others = [model for model in others if model != base]
        if method != "slerp":
            about_sources.append(
                "without the base model, whose difference from itself is zero: its weight had no effect"
            )
    if not others:
        draft.add_problem("genome.models", "there is none besides the base model")
    draft.add(f"base: {plain(base.model)}", *about_base)
    if method == "slerp" and len(others) > 1:
        about_sources.append(
            "mergekit-evolve takes in each group of layers the two models of the greatest weights; here all are merged "
            "one after the other, in an order that is searched"
        )
    names = source_names(m.lora or m.model for m in others)
    draft.add("sources:", *about_sources)
    for name, model in zip(names, others, strict=True):
        draft.add(f"- {source(name, model, base)}")
    draft.add(f"method: {method}")
    write_vocabulary(given, draft, base, dict(zip(names, others, strict=True)))
    return Genome(base.model, dict(zip(names, others, strict=True)), str(method))


def source(name: str, model: ModelReference, base: ModelReference) -> str:
    """A model as a source: a path, or a merge of an adapter into another model than the base."""
    if model.lora is None or model.model == base.model:
        return f"{{name: {plain(name)}, path: {plain(model.lora or model.model)}}}"
    inner = f"{{name: {plain(name)}, path: {plain(model.lora)}}}"
    return (
        f"{{name: {plain(name)}, recipe: {{method: passthrough, dtype: bfloat16, base: {{path: {plain(model.model)}}}, "
        f"sources: [{inner}]}}}}"
    )


def write_vocabulary(
    given: dict[str, Any], draft: Draft, base: ModelReference, sources: dict[str, ModelReference]
) -> None:
    """Write the vocabulary if the file names a `tokenizer_source`."""
    wanted = given.get("tokenizer_source")
    if wanted is None:
        return
    if wanted in ("base", "union"):
        draft.add(f"vocabulary: {wanted}")
        return
    model = draft.reference("genome.tokenizer_source", str(wanted).removeprefix("model:"))
    found = "base" if model == base else next((name for name, m in sources.items() if m == model), None)
    if found:
        draft.add(f"vocabulary: {plain(found)}")
    else:
        draft.add_problem("genome.tokenizer_source", f"{short_repr(wanted)} is not base, union or one of the models")


def write_space(given: dict[str, Any], genome: Genome, draft: Draft) -> None:
    """Write which coefficients move, between which bounds, and how finely along the layers."""
    draft.add("space:")
    negative = draft.switch("genome.allow_negative_weights", given.get("allow_negative_weights"), False)
    normalised = draft.switch("genome.normalize", given.get("normalize"), genome.method in NORMALISED)
    start = f"mergekit-evolve has no bounds and starts at 1/{len(genome.sources)}"
    if genome.method == "slerp":
        draft.add("  t: [0.0, 1.0]", "the softmax of two weights in mergekit-evolve, a number here")
        for key in ("normalize", "allow_negative_weights"):
            if given.get(key) is not None:
                draft.leave_out(f"genome.{key}", "slerp has none")
        for key in ("filters", "smooth"):
            if given.get(key):
                draft.add_problem(f"genome.{key}", "mergekit-evolve refuses it with slerp; leave it out")
    else:
        bounds = f"[{'-0.5' if negative else '0.0'}, {'1.0' if normalised else '1.5'}]"
        why = "; only the ratios count" if normalised else ""
        draft.add(f"  weight: {bounds}", start + ("" if negative else ", and takes absolute values") + why)
    if genome.method in ("ties", "dare_ties"):
        draft.add("  density: [0.1, 1.0]", "mergekit-evolve starts at 1 and clips to 0 .. 1; here 0 keeps nothing")
    if genome.method != "slerp":
        draft.add(f"  normalize: {str(normalised).lower()}")
    if genome.method == "dare_ties":
        draft.add("  rescale: l1", "as in mergekit; the papers' factor is `expected`")
    write_depth(given, genome, draft)
    write_components(given, draft)


def write_depth(given: dict[str, Any], genome: Genome, draft: Draft) -> None:
    """Write how many values there are along the layers."""
    step = read_scalar(given.get("layer_granularity", 0), "integer")
    if step is None:
        draft.add_problem("genome.layer_granularity", f"expected a whole number, found {given['layer_granularity']!r}")
        return
    smooth = draft.switch("genome.smooth", given.get("smooth"), False) and genome.method != "slerp"
    if step < 1:
        draft.add("  granularity: model")
        return
    models = [genome.base, *(m.model for m in genome.sources.values())]
    layers = next((n for m in models if (n := layers_of(m, draft.new.parent)) is not None), None)
    if layers is not None and layers % step:
        draft.add_problem("genome.layer_granularity", f"the models have {layers} layers, no multiple of {step:g}")
        return
    if layers is None:
        lost = f"layer_granularity: {step:g}"
        if smooth:
            draft.add("  granularity: depth")
            draft.add("  knots: 4", f"{lost}: make it the number of layers / {step:g}; the models are not here yet")
        elif step == 1:
            draft.add("  granularity: layer")
        else:
            draft.add(
                "  granularity: layer",
                f"{lost}: for the same, granularity: group, groups: the number of layers / {step:g}, which cannot be "
                "told before the models are here; single layers cost no more with the learned start",
            )
        return
    groups = layers // int(step)
    if groups == 1:
        draft.add("  granularity: model")
    elif smooth:
        draft.add("  granularity: depth")
        draft.add(
            f"  knots: {groups}",
            f"{layers} layers / {step:g}, straight lines between; norm and head take the last value here",
        )
    elif step == 1:
        draft.add("  granularity: layer")
    else:
        draft.add("  granularity: group")
        draft.add(f"  groups: {groups}", f"{layers} layers / {step:g}")


def layers_of(model: str, folder: Path) -> int | None:
    """The number of layers in a model's config.json, here or in the hub's cache; None if it is not there."""
    file: Any = (folder / model) / "config.json"
    if not os.path.isfile(file) and looks_like_hub_id(model):
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = model.partition("@")
        file = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(file, str | Path) or not os.path.isfile(file):
        return None
    try:
        config = read_json(Path(file))
    except EvomergeError:
        return None
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in LAYER_KEYS:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def write_components(given: dict[str, Any], draft: Draft) -> None:
    """Write which components have values of their own."""
    filters = draft.read_list("genome.filters", given["filters"], draft.text) if given.get("filters") else []
    found = dict.fromkeys(COMPONENT_OF[f.strip(".")] for f in filters if f.strip(".") in COMPONENT_OF)
    unknown = [f for f in filters if f.strip(".") not in COMPONENT_OF]
    differences = [f"filter {plain(text)}: no component of that name; its tensors share the rest's" for text in unknown]
    if filters:
        draft.add(f"  components: [{', '.join(found)}]", *differences)


def write_tasks(top: dict[str, Any], draft: Draft) -> None:
    """Write the tasks with their options, and how many items each split gets."""
    limit = draft.whole("limit", top["limit"]) if top.get("limit") is not None else None
    options = {
        "num_fewshot": draft.whole("num_fewshot", top["num_fewshot"], 0)
        if top.get("num_fewshot") is not None
        else None,
        "apply_chat_template": draft.switch("apply_chat_template", top.get("apply_chat_template"), True) or None,
        "fewshot_as_multiturn": None
        if draft.switch("fewshot_as_multiturn", top.get("fewshot_as_multiturn"), True)
        else False,
    }
    draft.add(
        "tasks:",
        "Trials climb by a smooth objective that fits the task; the metric is what the winner is judged by.  To search "
        "by the metric alone, give the task `objective:` with its name.",
        "Scores are scaled before they are added: 0 is the base, 1 the task's best model (`scale: none` adds them as "
        "they are).",
    )
    seen: set[str] = set()
    for number, given in enumerate(draft.read_list("tasks", top.get("tasks"), lambda where, item: item)):
        write_task(f"tasks.{number}", {"name": given} if isinstance(given, str) else given, options, seen, draft)
    if not seen and not draft.problems:
        draft.add_problem("tasks", "there is none whose weight is not 0")
    if limit is None:
        draft.add(
            "splits: {search: 0.4, selection: 0.2, holdout: 0.4}",
            "mergekit-evolve scores candidates and winner on all items; here the winner is judged on unseen ones",
        )
    else:
        draft.add(
            f"splits: {{search: {limit}, selection: {limit}, holdout: {2 * limit}}}",
            f"limit: {limit} is the search split; the winner is chosen and judged on other items.  Make the other two "
            f"smaller if a task has fewer than {4 * limit} items.",
        )


def write_task(where: str, given: Any, options: dict[str, Any], seen: set[str], draft: Draft) -> None:
    """Write one task.  seen: the names of the tasks before it."""
    parts = draft.mapping(where, given, ["name", "weight", "metric"])
    name = draft.text(f"{where}.name", parts.get("name"))
    weight = read_scalar(parts.get("weight", 1.0), "number")
    named = draft.text(f"{where}.metric", parts.get("metric", "acc,none"))
    if weight is None:
        draft.add_problem(f"{where}.weight", f"expected a number, found {short_repr(parts['weight'])}")
    if name is None or weight is None or named is None:
        return
    metric, _, taken = named.partition(",")
    if weight == 0:
        draft.leave_out(f"{where}, {name}", "its weight is 0; a task that must not get worse can be listed in `guards`")
    elif name in seen:
        draft.leave_out(f"{where}, {name} by {metric}", "a task is listed once, with one metric")
    else:
        seen.add(name)
        differences = []
        if weight < 0:
            from evomerge.evaluate.metrics import METRICS

            if metric in METRICS and METRICS[metric].higher_is_better:
                draft.add_problem(
                    f"{where}.weight", f"{weight:g}: every task is improved, so {metric} cannot be lowered"
                )
            differences.append(
                f"weight {weight:g}: metrics know their direction here (a perplexity is minimised), so it is positive"
            )
        metric = metric if taken in ("", "none") else f"{metric},{taken}"
        keys = {"metric": metric, "weight": abs(weight) if abs(weight) != 1 else None, **options}
        entry, more = draft.task(name, **keys)
        draft.add(entry, *differences, *more)
