"""mergekit's files, read and written: the recipe has mergekit's value at every tensor, what cannot be said is refused
with a readable line, and the way there and back changes nothing."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import LAYERS, llama_shapes, write_adapter, write_family, write_llama

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.coefficient_from_values import shortest_coefficient, value_from_entries
from evomerge.merge.mergekit.from_recipe import dump_mergekit
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.merge.mergekit.mergekit_methods import MERGEKIT
from evomerge.merge.mergekit.parse_mergekit import parse_mergekit
from evomerge.merge.mergekit.to_recipe import to_recipe
from evomerge.merge.methods import METHODS
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.coefficients import FilteredValue, filtered_values
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.tensor_names import coefficient_layer, tensor_role

TENSORS = list(llama_shapes())
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
UP0, UP1 = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models base, one, two and the adapter lora."""
    path = tmp_path_factory.mktemp("family")
    write_family(path, ["one", "two", "three"])
    write_adapter(path / "lora", path / "base")
    return path


def written(folder: Path, content: Any) -> Path:
    file = folder / "file.yml"
    file.write_text(yaml.safe_dump(content) if not isinstance(content, str) else content)
    return file


def merge(**content: Any) -> dict[str, Any]:
    plain = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
    return {k: v for k, v in (plain | {"parameters": {"weight": 1}} | content).items() if v is not None}


def recipe_of(folder: Path, **content: Any) -> Recipe:
    return load_merge(written(folder, merge(**content)))[0]


def weights(recipe: Recipe, *names: str) -> list[tuple[float, ...]]:
    return [recipe.knobs(tensor_role(name), LAYERS).each["weight"] for name in names]


# --- Values ---


def test_a_gradient_is_read_layer_by_layer_and_outside_the_stack_its_first_value_counts(folder: Path):
    recipe = recipe_of(folder, parameters={"weight": [0.2, 0.4, 1.0]})
    assert [w[0] for w in weights(recipe, EMBEDDING, Q0, UP1, FINAL_NORM, HEAD)] == [0.2, 0.2, 1.0, 0.2, 0.2]


def test_a_models_own_value_comes_first_and_what_no_filter_fits_falls_through(folder: Path):
    own = {"weight": [{"filter": "self_attn", "value": [0.1, 0.3]}, {"filter": "norm", "value": "5e-1"}]}
    recipe = recipe_of(
        folder,
        models=[{"model": "one", "parameters": own}, {"model": "two"}, {"model": "base", "parameters": {"weight": 9}}],
        parameters={"weight": [{"filter": "mlp", "value": 0.7}, {"filter": "*", "value": 0.9}]},
    )
    assert weights(recipe, Q0, Q1, UP0, FINAL_NORM, HEAD) == [
        (0.1, 0.9),
        (0.3, 0.9),
        (0.7, 0.7),
        (0.5, 0.9),
        (0.9, 0.9),
    ]


def test_values_that_are_the_same_everywhere_stay_one_number(folder: Path):
    recipe = recipe_of(folder, parameters={"weight": [0.5, 0.5], "normalize": "true", "lambda": "1.5"})
    assert recipe.sources[0].parameters == {"weight": 0.5}
    assert recipe.parameters == {"normalize": True, "lambda": 1.5}


names_of_tensors = st.sampled_from(TENSORS)
numbers = st.integers(0, 3).map(float)


@settings(deadline=None, max_examples=100)
@given(
    values=st.fixed_dictionaries(dict.fromkeys(TENSORS, numbers)), filters=st.lists(st.text("lmn.01_ay", min_size=1))
)
def test_a_coefficient_has_the_values_it_was_made_of(values: dict[str, float], filters: list[str]):
    found = shortest_coefficient(values, filters, LAYERS)
    parts = filtered_values(found) or [FilteredValue(value=found)]  # type: ignore[arg-type]
    assert {n: value_from_entries(parts, n, LAYERS, coefficient_layer) for n in TENSORS} == values


gradients = numbers | st.lists(numbers, min_size=1, max_size=4)
conditionals = st.lists(
    st.fixed_dictionaries({"value": gradients}, optional={"filter": st.sampled_from(["mlp", "norm", "layers.1", "*"])}),
    min_size=1, max_size=3,
)  # fmt: skip
scopes = st.fixed_dictionaries({}, optional={"weight": gradients | conditionals})


def mergekits_value(setting: Any, name: str, t: float) -> float | None:
    """mergekit's documented rule, written down once more."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for part in setting:
            if part.get("filter", "*") == "*" or part["filter"] in name:
                return mergekits_value(part["value"], name, t)
        return None
    if isinstance(setting, list):
        knots = [i / max(1, len(setting) - 1) for i in range(len(setting))]
        right = next(i for i, k in enumerate(knots) if k >= t or i == len(knots) - 1)
        left = max(0, right - 1)
        width = knots[right] - knots[left] or 1.0
        return setting[left] + (setting[right] - setting[left]) * min(1.0, (t - knots[left]) / width)
    return float(setting)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(own=scopes, common=scopes)
def test_every_tensor_has_the_value_that_mergekit_gives_it(own: dict[str, Any], common: dict[str, Any], folder: Path):
    common = common | {"weight": [*as_list(common.get("weight", 0.5)), {"value": 2.0}]}
    recipe = recipe_of(folder, models=[{"model": "one", "parameters": own}], parameters=common)
    for name in TENSORS:
        t = float(tensor_role(name).layer or 0)  # of two layers
        expected = [mergekits_value(s["weight"], name, t) for s in (own, common) if "weight" in s]
        first = next(v for v in expected if v is not None)
        assert weights(recipe, name)[0][0] == pytest.approx(first, abs=1e-12), name


def as_list(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) and isinstance(setting[0], dict) else [{"value": setting}]


# --- Models, types, templates ---


def test_methods_that_know_no_base_take_every_model_and_the_first_ones_tokenizer(folder: Path):
    recipe = recipe_of(folder, merge_method="linear", base_model=None)
    assert [recipe.base.path, *(s.path for s in recipe.sources)] == [str(folder / n) for n in ("one", "one", "two")]
    assert [s.name for s in recipe.sources] == ["one", "two"]


def test_linear_takes_the_base_model_as_one_of_its_models(folder: Path):
    recipe = recipe_of(folder, merge_method="linear")
    assert [recipe.base.path, *(s.path for s in recipe.sources)] == [
        str(folder / n) for n in ("base", "one", "two", "base")
    ]
    assert [s.name for s in recipe.sources] == ["one", "two", "base-2"]


def test_an_adapter_on_the_base_is_a_source(folder: Path):
    recipe = recipe_of(folder, models=[{"model": "base+lora"}, {"model": {"model": "base", "lora": "lora"}}][:1])
    assert [(s.name, s.path) for s in recipe.sources] == [("lora", str(folder / "lora"))]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({}, "float32"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_the_output_has_the_type_that_the_file_names_or_the_bases(types: dict[str, str], expected: str, folder: Path):
    assert recipe_of(folder, **types).dtype == expected


def test_what_mergekit_passes_over_is_passed_over_and_said(folder: Path):
    models = [{"model": "one", "parameters": {"normalize": True}}, {"model": "base", "parameters": {"weight": 3}}]
    parameters = {"weight": 1, "int8_mask": True, "t": 0.5}
    recipe, notes = load_merge(written(folder, merge(models=models, parameters=parameters)))
    assert recipe.parameters == {}
    assert [note.split(":")[0] for note in notes] == ["int8_mask", "normalize", "t", "parameters of the base model"]


PASSED_OVER: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"name": "mine"}, "name"),
    "an anchor's key": ({"x-common": {"weight": 1}}, "x-common"),
    "a note at a model": ({"models": [{"model": "one", "note": "math"}]}, "models.0.note"),
    "an old parameter": ({"parameters": {"weight": 1, "embed_slerp": True}}, "parameters.embed_slerp"),
    "a key beside a filter": (
        {"parameters": {"weight": [{"filter": "mlp", "value": 1, "why": "x"}, {"value": 1}]}},
        "parameters.weight.0.why",
    ),
    "a key of the tokenizer": ({"tokenizer": {"source": "base", "note": 1}}, "tokenizer.note"),
}


@pytest.mark.parametrize(("changes", "key"), PASSED_OVER.values(), ids=PASSED_OVER)
def test_a_key_that_mergekit_does_not_know_is_passed_over_and_said(changes: dict[str, Any], key: str, folder: Path):
    recipe, notes = load_merge(written(folder, merge(**changes)))
    assert notes == [f"{key}: mergekit has no key of that name; ignored, as in mergekit"]
    assert recipe.sources[0].parameters == {"weight": 1.0}


SAID_OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a quoted boolean": ({"normalize": "true", "int8_mask": "Yes"}, {"normalize": True}),
    "a number for a boolean": ({"normalize": 1, "int8_mask": 0.0}, {"normalize": True}),
    "an empty filter": ({"lambda": [{"filter": "", "value": 2}, {"value": 1}]}, {"lambda": 2}),
    "a gradient of one": ({"lambda": ["2"]}, {"lambda": 2}),
    "an empty gradient": ({"lambda": []}, {}),
    "an empty gradient with a filter": ({"lambda": [{"filter": "mlp", "value": []}, {"value": 2}]},
                                        {"lambda": [{"filter": "mlp", "value": 1}, {"value": 2}]}),
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "plainly"), SAID_OTHERWISE.values(), ids=SAID_OTHERWISE)
def test_what_is_said_in_another_way_means_the_same(theirs: dict[str, Any], plainly: dict[str, Any], folder: Path):
    found, expected = (recipe_of(folder, parameters={"weight": 1} | more) for more in (theirs, plainly))
    assert found == expected


@pytest.mark.parametrize(
    "model",
    ["./one@main", {"model": {"path": "one", "revision": "main"}}, {"model": "one", "override_architecture": None}],
)
def test_a_folder_has_no_revisions(model: Any, folder: Path):
    assert recipe_of(folder, models=[{"model": model}]).sources[0].path == str(folder / "one")


@pytest.mark.parametrize(("given", "meant"), [(5000, 1000), (-1, 0), ("20", 20)])
def test_steps_beyond_those_that_change_anything_are_read_as_those(given: Any, meant: float, folder: Path):
    recipe = recipe_of(folder, merge_method="karcher", base_model=None, parameters={"max_iter": given})
    assert recipe.parameters == {"max_iter": meant}


def test_empty_outputs_and_types_are_as_if_left_out(folder: Path):
    plain = recipe_of(folder)
    assert recipe_of(folder, slices=[], modules={}, dtype="", chat_template="", tokenizer_source=None) == plain


def test_a_slice_may_name_the_one_base_again(folder: Path):
    own = [part | {"base_model": "base"} for part in SLICES]
    assert recipe_of(folder, models=None, slices=own) == recipe_of(folder, models=None, slices=SLICES)
    assert recipe_of(folder, models=None, slices=own, base_model=None) == recipe_of(folder, models=None, slices=SLICES)


def test_without_a_type_the_output_holds_the_numbers_of_all_models(folder: Path, tmp_path: Path):
    write_llama(tmp_path / "half", 1, dtype=torch.bfloat16)
    assert recipe_of(folder, base_model=str(tmp_path / "half")).dtype == "float32"
    half = [{"model": str(tmp_path / "half")}]
    assert recipe_of(folder, merge_method="linear", base_model=None, models=half).dtype == "bfloat16"


# --- Several documents ---

FIRST = "name: first\nmerge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 0.5}\n"
LAST = "merge_method: slerp\nbase_model: first\nmodels: [{model: three}]\nparameters: {t: 0.3}\n"


def test_later_documents_use_the_merges_of_earlier_ones(folder: Path):
    for text in (f"{FIRST}---\n{LAST}", f"{LAST}---\n{FIRST}", f"{FIRST}---\nname: last\n{LAST}"):
        recipe, notes = load_merge(written(folder, text))
        assert [s.name for s in recipe.sources] == ["first", "three"]
        inner = recipe.sources[0].recipe
        assert inner is not None
        assert [s.path for s in inner.sources] == [str(folder / "one"), str(folder / "two")]
        assert (recipe.base.path, recipe.parameters, notes) == (str(folder / "one"), {"t": 0.3}, [])


BAD_DOCUMENTS = {
    "two ends": (f"{FIRST}---\nname: other\n{LAST.replace('first', 'base')}", "which merge is the result?"),
    "a name twice": (f"{FIRST}---\n{FIRST}", "two documents have the name 'first'"),
    "two without a name": (f"{LAST}---\n{LAST}", "two documents have no name"),
    "a circle": (f"{FIRST.replace('one', 'first')}---\n{LAST}", "the merge 'first' needs itself"),
    "no merge": (f"{FIRST}---\nweight: 1\n", "document 2 is not a configuration of mergekit"),
    "a merge as the base of task vectors": (
        f"{FIRST}---\n{LAST.replace('slerp', 'ties').replace('t: ', 'weight: ')}",
        "base_model: the merge 'first' cannot be the base of ties; merge it into a checkpoint first",
    ),
    "an adapter on a merge": (
        f"{FIRST}---\n{LAST.replace('three', 'first+lora')}", "an adapter on a merge of this file is not supported"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_documents_that_do_not_make_one_model_are_refused(text: str, line: str, folder: Path):
    with pytest.raises(EvomergeError, match=re.escape(line)):
        load_merge(written(folder, text))


def test_a_recipe_of_ones_own_is_read_as_before(folder: Path):
    own = {"method": "linear", "base": {"path": "base"}, "sources": [{"name": "a", "path": "one"}]}
    recipe, notes = load_merge(written(folder, own))
    assert (recipe.method, recipe.sources[0].path, notes) == ("linear", str(folder / "one"), [])


def test_every_method_of_mergekit_is_here_with_its_knobs():
    for name, theirs in MERGEKIT.items():
        assert set(theirs.parameters) - set(METHODS[name].knobs) <= {"rescale"}, name


SLICES = [
    {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "one", "layer_range": [0, 2]}]},
    {"sources": [{"model": "two", "layer_range": [1, 2], "parameters": {"weight": [0.3, 0.6]}},
                 {"model": "base", "layer_range": ["1", 2]}]},
]  # fmt: skip


def test_slices_are_the_recipes_slices_and_gradients_run_along_each(folder: Path):
    recipe = recipe_of(folder, models=None, slices=SLICES, parameters={"weight": [0.1, 0.2]})
    assert [part.layers for part in recipe.slices] == [{"one": (0, 2), "base": (0, 2)}, {"two": (1, 2), "base": (1, 2)}]
    one, two = (source.parameters["weight"] for source in recipe.sources)
    knobs = {n: recipe.knobs(tensor_role(n), 3).each["weight"] for n in (EMBEDDING, Q0, Q1, Q1.replace("1", "2"), HEAD)}
    assert [knobs[n][0] for n in (EMBEDDING, Q0, Q1)] == [0.1, 0.1, 0.2], one
    assert [knobs[n][1] for n in (Q1.replace("1", "2"), HEAD)] == [0.6, 0.3], two  # a single layer is at the end


def test_slices_of_no_layer_say_whose_tensors_stand_at_the_ends(folder: Path):
    parts = [("two", [0, 0]), ("one", [0, 1]), ("base", [1, 1]), ("one", [1, 2]), ("base", [9, 9])]
    content = [{"sources": [{"model": model, "layer_range": layers}]} for model, layers in parts]
    recipe = recipe_of(folder, merge_method="passthrough", base_model=None, models=None, slices=content, parameters={})
    layout = open_bank(recipe).layout
    assert layout.layers == LAYERS
    assert {n: list(layout.origins[n]) for n in (EMBEDDING, Q0, Q1, FINAL_NORM, HEAD)} == {
        EMBEDDING: ["two"], Q0: ["one"], Q1: ["one"], FINAL_NORM: ["base-2"], HEAD: ["base-2"]
    }  # fmt: skip
    with pytest.raises(EvomergeError, match="slices: none of them has a layer"):
        open_bank(recipe.model_copy(update={"slices": recipe.slices[:1]}))


def test_an_adapter_on_another_model_than_the_base_is_merged_into_it_first(folder: Path, tmp_path: Path):
    recipe = recipe_of(folder, models=[{"model": "one+lora"}])
    (source,) = recipe.sources
    assert source.recipe is not None
    assert (source.name, source.recipe.base.path) == ("lora", str(folder / "one"))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "one", dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload().state_dict()
    bank = open_bank(recipe)
    for name in TENSORS:
        assert torch.allclose(bank.source("lora", name), expected[name], atol=1e-6), name


def test_slices_of_whole_models_are_no_slices(folder: Path):
    whole = [{"sources": [{"model": n, "layer_range": [0, 2]} for n in ("base", "one")]}]
    assert recipe_of(folder, models=None, slices=whole).slices == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer_source": "./two"}, "two"),
        ({"tokenizer_source": {"model": "./base"}}, "base"),
    ],
)
def test_a_tokenizer_is_the_recipes_vocabulary(keys: dict[str, Any], expected: str, folder: Path):
    assert recipe_of(folder, **keys).vocabulary == expected


def test_a_chat_template_is_written_to_the_model(folder: Path, tmp_path: Path):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "two" / "chat_template.jinja").write_text(template)
    recipe = recipe_of(folder, chat_template="auto")
    assert recipe.chat_template == template
    export(recipe, open_bank(recipe), tmp_path / "out", model_card)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert "im_start" in str(recipe_of(folder, chat_template="chatml").chat_template)
    (folder / "two" / "chat_template.jinja").unlink()


# --- Bad files ---

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"merge_method": "mash"}, "merge_method: 'mash' is not one of linear, slerp"),
    "unknown key": ({"modells": []}, "modells: unknown key; is it meant to be models?"),
    "nothing to merge": (
        {"models": None},
        "models: exactly one of models, slices and modules must be given, here are 0",
    ),
    "two outputs": (
        {"slices": [{"sources": []}]},
        "models: exactly one of models, slices and modules must be given, here are 2",
    ),
    "other modules": (
        {"models": None, "modules": {"text_decoder": {"models": [{"model": "one"}]}}},
        "modules: only the one module `default`",
    ),
    "no model": ({"models": [{"parameters": {}}]}, "models.0.model: expected text, found None"),
    "unknown key of a model": ({"models": [{"modell": "one"}]}, "models.0.modell: unknown key"),
    "two adapters": ({"models": [{"model": "a+b+c"}]}, "models.0.model: 'a+b+c' is not MODEL or MODEL+LORA"),
    "unknown parameter": (
        {"parameters": {"weights": 1}},
        "parameters.weights: unknown key; is it meant to be weight?",
    ),
    "no number": ({"parameters": {"weight": "much"}}, "parameters.weight: expected a number, found 'much'"),
    "infinite": ({"parameters": {"weight": float("inf")}}, "parameters.weight: expected a number, found inf"),
    "no truth": (
        {"parameters": {"weight": 1, "normalize": 2}},
        "parameters.normalize: expected true or false, found 2",
    ),
    "an empty gradient": ({"parameters": {"weight": []}}, "weight: must be given for one; lm_head.weight has no"),
    "another architecture": (
        {"models": [{"model": {"model": "one", "override_architecture": "X"}}]},
        "models.0.model.override_architecture: not supported; a model has the architecture that its config.json names",
    ),
    "a wrong key beside a filter": (
        {"parameters": {"weight": [{"filtre": "mlp", "value": 1}]}},
        "parameters.weight.0.filtre: unknown key",
    ),
    "mixed list": ({"parameters": {"weight": [1, {"value": 1}]}}, "parameters.weight.0: expected a mapping, found 1"),
    "unknown dtype": ({"dtype": "int8"}, "dtype: 'int8' is not one of float32"),
    "token rules": (
        {"tokenizer": {"source": "base", "tokens": {"<s>": {"source": "one"}}}},
        "tokenizer.tokens: rules for single tokens are not supported",
    ),
    "a tokenizer of another model": ({"tokenizer_source": "./three"}, "three is not one of the models"),
    "a template by an unknown name": ({"chat_template": "alpaca"}, "chat_template: 'alpaca' is not a template"),
    "slices of other lengths": (
        {
            "models": None,
            "slices": [
                {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "one", "layer_range": [0, 1]}]}
            ],
        },
        "slices.0: its sources have layer ranges of different lengths",
    ),
    "a slice without the base": (
        {"models": None, "slices": [{"sources": [{"model": "one", "layer_range": [0, 1]}]}]},
        "slices.0: lacks the base model",
    ),
    "no range": (
        {"models": None, "slices": [{"sources": [{"model": "one", "layer_range": [2, 1]}]}]},
        "slices.0.sources.0.layer_range: expected [FIRST, END] with FIRST not above END, found [2, 1]",
    ),
    "a base of its own": (
        {"models": None, "slices": [{"base_model": "two", "sources": [{"model": "one", "layer_range": [0, 1]}]}]},
        "slices.0.base_model: only one base model for the whole merge",
    ),
    "two tokenizers": ({"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer: give it or tokenizer_source"),
    "required parameter missing": (
        {"parameters": {}},
        "weight: must be given for one; lm_head.weight has no",
    ),
    "required parameter missing at some tensors": (
        {"parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
        "weight: must be given for one; lm_head.weight has no value",
    ),
    "no base": ({"base_model": None}, "base_model: task_arithmetic needs it"),
    "one model twice": ({"models": [{"model": "one"}, {"model": "./one"}]}, "models: the same model twice"),
    "too many models": (
        {"merge_method": "slerp", "parameters": {"t": 0.5}},
        "models: slerp takes 1 model(s) besides the base, here are 2",
    ),
    "an adapter as the base": ({"base_model": "base+lora"}, "base_model: an adapter cannot be the base"),
    "out of our range": (
        {"merge_method": "slerp", "models": [{"model": "one"}], "parameters": {"t": 1.5}},
        "1.5 is outside 0 to 1",
    ),
}


@pytest.mark.parametrize(("changes", "line"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_merged_is_refused_with_a_line_that_says_why(
    changes: dict[str, Any], line: str, folder: Path
):
    file = written(folder, merge(**changes))
    with pytest.raises(EvomergeError, match=re.escape(line)) as caught:
        load_merge(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_all_problems_of_a_file_are_said_together(folder: Path):
    with pytest.raises(EvomergeError, match="3 problem") as caught:
        load_merge(written(folder, merge(merge_method="mash", dtype="int8", parameter=1)))
    assert len(str(caught.value).splitlines()) == 4


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("base+lora"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["model", "value", "filter", "weight", "sources", "layer_range", "default", "models", "x"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
models = st.lists(
    st.fixed_dictionaries(
        {"model": st.sampled_from(["base", "one", "two", "base+lora"])},
        optional={
            "layer_range": st.sampled_from([[0, 1], [0, 2], [1, 9]]),
            "parameters": st.dictionaries(
                st.sampled_from(["weight", "t", "density", "max_iter"]), anything, max_size=2
            ),
        },
    ),
    max_size=3,
)
keys = [
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "dtype",
    "tokenizer",
    "chat_template",
    "parameters",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    changes=st.dictionaries(st.sampled_from(keys), anything, max_size=4)
    | st.fixed_dictionaries(
        {"merge_method": st.sampled_from(list(MERGEKIT)), "base_model": st.sampled_from([None, "base", "one"])},
        optional={"models": models, "slices": st.lists(st.fixed_dictionaries({"sources": models}), max_size=2)},
    ),
    whole=st.none() | anything,
)
def test_whatever_a_file_holds_nothing_but_a_readable_error_comes_out(
    changes: dict[str, Any], whole: Any, folder: Path
):
    with suppress(EvomergeError):
        file = folder / "file.yml"
        to_recipe(parse_mergekit(merge(**changes) if whole is None else whole, file), file)


# --- The way back ---


def round_trip(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    text, notes = dump_mergekit(recipe)
    return load_merge(written(folder, text))[0], notes


per_layer = numbers | st.lists(numbers, min_size=LAYERS, max_size=LAYERS)
coefficients = (
    per_layer
    | st.fixed_dictionaries(
        {"default": per_layer}, optional=dict.fromkeys(("attention", "mlp", "norm", "head"), per_layer)
    )
    | st.builds(
        lambda parts, rest: [*parts, FilteredValue(value=rest)],
        st.lists(
            st.builds(FilteredValue, filter=st.sampled_from(["mlp", "1.self", "norm"]), value=per_layer), max_size=2
        ),
        per_layer,
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    first=coefficients, second=coefficients, scale=coefficients, method=st.sampled_from(["task_arithmetic", "linear"])
)
def test_there_and_back_every_tensor_keeps_its_coefficients(
    first: Any, second: Any, scale: Any, method: str, folder: Path
):
    sources = [
        RecipeSource(name="one", path=str(folder / "one"), parameters={"weight": first}),
        RecipeSource(name="lora", path=str(folder / "lora"), parameters={"weight": second}),
    ]
    parameters = {"lambda": scale} if method == "task_arithmetic" else {"normalize": False}
    recipe = Recipe(
        method=method, dtype="float16", base=Model(path=str(folder / "base")), sources=sources, parameters=parameters
    )
    back, notes = round_trip(recipe, folder)
    assert (back.base, back.dtype, notes) == (recipe.base, recipe.dtype, [])
    assert [(s.name, s.path) for s in back.sources] == [(s.name, s.path) for s in sources]
    for name in TENSORS:
        theirs, ours = back.knobs(tensor_role(name), LAYERS), recipe.knobs(tensor_role(name), LAYERS)
        assert (theirs.each, theirs.shared) == (ours.each, ours.shared), name


@pytest.mark.parametrize("method", MERGEKIT)
def test_every_method_comes_back_with_its_knobs(method: str, folder: Path):
    count = MERGEKIT[method].models[1] or max(2, METHODS[method].sources[0])
    sources = [RecipeSource(name=n, path=str(folder / n)) for n in ("one", "two", "three")[:count]]
    parameters: dict[str, Any] = {
        k: "l1" if v.choices else True if v.switch else 3 if k == "max_iter" else 0.25
        for k, v in METHODS[method].knobs.items()
    }
    recipe = Recipe(method=method, base=Model(path=str(folder / "base")), sources=sources, parameters=parameters)
    back, _ = round_trip(recipe, folder)
    assert back.knobs(tensor_role(Q1), LAYERS) == recipe.knobs(tensor_role(Q1), LAYERS)


def test_slices_come_back(folder: Path):
    parameters = {
        "weight": [{"filter": "mlp", "value": [0.1, 0.2]}, {"filter": "layers.1", "value": 0.7}, {"value": 0.4}]
    }
    recipe = recipe_of(folder, models=None, slices=SLICES, parameters=parameters, tokenizer_source="union")
    back, _ = round_trip(recipe, folder)
    assert back == recipe


def test_what_mergekit_cannot_express_is_refused(folder: Path):
    base, inner = Model(path=str(folder / "base")), RecipeSource(name="one", path=str(folder / "one"))
    nested = Recipe(method="linear", base=base, sources=[inner])
    with pytest.raises(EvomergeError, match="mergekit cannot merge merges: twice has a recipe of its own"):
        dump_mergekit(Recipe(method="linear", base=base, sources=[RecipeSource(name="twice", recipe=nested)]))


def test_slerp_of_two_sources_has_the_first_as_base(folder: Path):
    sources = [RecipeSource(name=n, path=str(folder / n)) for n in ("one", "two")]
    recipe = Recipe(method="slerp", base=Model(path=str(folder / "base")), sources=sources, parameters={"t": 0.3})
    back, notes = round_trip(recipe, folder)
    assert (back.base.path, [s.path for s in back.sources]) == (str(folder / "one"), [str(folder / "two")])
    assert notes == ["mergekit takes the configuration and the tokenizer from one."]


@pytest.mark.parametrize(
    ("method", "parameters"), [("slerp", {"t": [0.3, 0.6]}), ("nearswap", {"t": 0.1}), ("arcee_fusion", {})]
)
def test_several_sources_are_written_as_one_merge_after_the_other(
    method: str, parameters: dict[str, Any], folder: Path
):
    sources = [RecipeSource(name=n, path=str(folder / n)) for n in ("one", "two", "three")]
    recipe = Recipe(method=method, base=Model(path=str(folder / "base")), sources=sources, parameters=parameters)
    documents = list(yaml.safe_load_all(dump_mergekit(recipe)[0]))
    models = ["one", "two", "three"] if method == "slerp" else ["base", "one", "two", "three"]
    paths = [str(folder / n) for n in models]
    names = [f"step{k}" for k in range(1, len(documents))]
    assert [d.get("name") for d in documents] == [*names, None]
    assert [d["base_model"] for d in documents] == [paths[0], *names]
    assert [d["models"] for d in documents] == [[{"model": path}] for path in paths[1:]]
    assert {d["dtype"] for d in documents} == {"float32"}
    assert [d.get("out_dtype") for d in documents] == [*[None] * len(names), "bfloat16"]


@pytest.mark.parametrize("more", [{}, {"vocabulary": "union"}])
def test_several_sources_that_mergekit_cannot_merge_in_steps_are_refused(more: dict[str, Any], folder: Path):
    sources = [RecipeSource(name=n, path=str(folder / n)) for n in ("one", "two", "three")]
    method, parameters = ("slerp", {"t": 0.5}) if more else ("nuslerp", {"weight": 1.0})
    base = Model(path=str(folder / "base"))
    recipe = Recipe(method=method, base=base, sources=sources, parameters=parameters, **more)
    with pytest.raises(EvomergeError, match=f"mergekit's {method} merges two models, and this recipe merges 3 sources"):
        dump_mergekit(recipe)


def test_other_masks_are_said_in_the_file(folder: Path):
    sources = [RecipeSource(name=n, path=str(folder / n)) for n in ("one", "two")]
    parameters = {"weight": 0.5, "density": 0.5}
    recipe = Recipe(method="dare_ties", base=Model(path=str(folder / "base")), sources=sources, parameters=parameters)
    text, notes = dump_mergekit(recipe)
    assert len(notes) == 2
    assert all(f"# {note}\n" in text for note in notes)
