"""Recipes: what is written is what is read, wrong ones are refused with a readable line, and each tensor finds its
coefficients."""

import math
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import LAYERS, llama_shapes, write_family

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knob
from evomerge.merge.recipe.coefficients import Coefficient, FilteredValue
from evomerge.merge.recipe.pinned_inputs import check_fingerprints, with_fingerprints
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, check_layers, dump_recipe, load_recipe
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import COMPONENTS, TensorRole, tensor_role

# --- Round trip ---

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
folders = st.text("abcäß 0-_:#'\"{}[],&*!|>%@", min_size=1, max_size=12).map(lambda name: f"/models/{name}x")
digests = st.dictionaries(
    st.sampled_from(["model.safetensors", "config.json"]), st.text("0123456789abcdef", max_size=64)
)


def coefficients(knob: Knob) -> st.SearchStrategy[Coefficient]:
    if knob.switch:
        return st.booleans()
    if knob.choices:
        return st.booleans() | st.sampled_from(list(knob.choices))
    low, high = max(knob.low, -1e6), min(knob.high, 1e6)
    number = st.floats(low, high) | st.integers(math.ceil(low), int(high)).map(float)
    per_layer = number | st.lists(number, min_size=1, max_size=4)
    per_component = st.dictionaries(st.sampled_from(COMPONENTS), per_layer, max_size=3)
    named = st.builds(FilteredValue, filter=st.text(min_size=1, max_size=6), value=per_layer)
    return (
        per_layer
        | st.builds(lambda parts, rest: parts | {"default": rest}, per_component, per_layer)
        | st.builds(lambda parts, rest: [*parts, FilteredValue(value=rest)], st.lists(named, max_size=3), per_layer)
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method = METHODS[draw(st.sampled_from(list(METHODS)))]
    least, most = method.sources
    names = draw(st.lists(texts, min_size=least, max_size=most or 3, unique=True))
    shared = {k: coefficients(v) for k, v in method.knobs.items()}
    own = {k: coefficients(v) for k, v in method.knobs.items() if v.each}
    required = {k for k, v in method.knobs.items() if v.default is None}
    parameters = draw(
        st.fixed_dictionaries(
            {k: v for k, v in shared.items() if k in required},
            optional={k: v for k, v in shared.items() if k not in required},
        )
    )
    for switch, excluded in method.excludes.items():
        if switch in parameters:
            parameters.pop(excluded, None)
    return Recipe(
        method=method.name,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        seed=draw(st.integers(0, 2**63 - 1)),
        base=Model(path=draw(folders), sha256=draw(digests)),
        sources=[
            RecipeSource(
                name=name,
                path=draw(folders),
                sha256=draw(digests),
                statistics="/statistics" if method.statistics else None,
                parameters=draw(st.fixed_dictionaries({}, optional=own)),
            )
            for name in names
        ],
        parameters=parameters,
        outputs=draw(digests),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(recipe=recipes())
def test_a_dumped_recipe_loads_as_itself(recipe: Recipe, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_a_relative_path_is_taken_from_the_folder_of_the_recipe(tmp_path: Path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    file = written(tmp_path / "recipe.yaml", base={"path": "models/base"}, sources=[source("one", path="./nearby")])
    recipe = load_recipe(file)
    assert recipe.base.path == str(tmp_path / "models" / "base")
    assert recipe.sources[0].path == str(tmp_path / "nearby")


def test_a_hub_id_stays_a_hub_id(tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", base={"path": "owner/name@v1"})
    assert load_recipe(file).base.path == "owner/name@v1"


# --- Checkpoints of a run ---


def run_of(folder: Path, *steps: int) -> Path:
    """A run's folder with a model folder per step (nothing opens them here)."""
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
    return folder


def averaged(file: Path, pattern: str, last: object, **keys: object) -> Path:
    """A recipe file over a run's checkpoints."""
    entry = {"checkpoints": pattern, "last": last} | keys
    return written(file, method="checkpoint_average", parameters={}, sources=[entry])


def names_in(file: Path) -> list[str]:
    return [s.name for s in load_recipe(file).sources]


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=8, unique=True), data=st.data())
def test_the_last_checkpoints_are_those_of_the_latest_steps_oldest_first(steps: list[int], data: st.DataObject):
    last = data.draw(st.integers(1, len(steps)))
    with TemporaryDirectory() as folder:
        run_of(Path(folder) / "run", *steps)
        recipe = load_recipe(averaged(Path(folder) / "recipe.yaml", "run/checkpoint-*", last))
        expected = [f"checkpoint-{step}" for step in sorted(steps)[-last:]]
        assert [s.name for s in recipe.sources] == expected
        assert [s.path for s in recipe.sources] == [str(Path(folder).resolve() / "run" / name) for name in expected]


def test_a_recipe_over_checkpoints_is_dumped_with_plain_sources(tmp_path: Path):
    run_of(tmp_path / "run", 900, 1000)
    recipe = load_recipe(averaged(tmp_path / "recipe.yaml", "run/checkpoint-*", 2))
    dumped = tmp_path / "elsewhere" / "recipe.yaml"
    dumped.parent.mkdir()
    dumped.write_text(dump_recipe(recipe))
    run_of(tmp_path / "run", 1100)
    assert load_recipe(dumped) == recipe


def test_a_pattern_counts_from_the_folder_of_the_recipe_unless_it_is_absolute(tmp_path: Path):
    folder = run_of(tmp_path / "run[1]", 5)
    run_of(tmp_path / "elsewhere", 7)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    file = folder / "recipe.yaml"
    assert names_in(averaged(file, "checkpoint-*", 1)) == ["checkpoint-5"]
    assert names_in(averaged(file, "linked/*", 1)) == ["checkpoint-7"]
    assert names_in(averaged(file, f"{tmp_path}/elsewhere/checkpoint-?", 1)) == ["checkpoint-7"]


def test_files_folders_without_a_model_and_second_links_are_no_checkpoints(tmp_path: Path):
    run = run_of(tmp_path / "run", 9, 10)
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-12").write_text("a file")
    (run / "checkpoint-latest").symlink_to(run / "checkpoint-10")
    (run / "checkpoint-8").mkdir()
    (run / "checkpoint-8" / "adapter_config.json").write_text("{}")
    file = averaged(tmp_path / "recipe.yaml", "run/checkpoint-*", 3)
    assert names_in(file) == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]


def test_checkpoints_stand_beside_other_sources(tmp_path: Path):
    run_of(tmp_path / "run", 1, 2)
    sources = [source("one"), {"checkpoints": "run/*", "last": 2}, source("two")]
    file = written(tmp_path / "recipe.yaml", sources=sources)
    assert names_in(file) == ["one", "checkpoint-1", "checkpoint-2", "two"]


@pytest.mark.parametrize(
    ("pattern", "last", "keys", "line"),
    [
        ("run/step-*", 2, {}, "run/step-* matches 0 model folders, but `last` is 2"),
        ("run/checkpoint-*", 4, {}, "run/checkpoint-* matches 3 model folders, but `last` is 4"),
        ("run/checkpoint-*", 0, {}, "`last`, a number of 1 or more"),
        ("run/checkpoint-*", True, {}, "`last`, a number of 1 or more"),
        ("run/checkpoint-*", "all", {}, "`last`, a number of 1 or more"),
        ("run/checkpoint-*", None, {}, "`last`, a number of 1 or more"),
        (["run/checkpoint-*"], 2, {}, "give `checkpoints`, a pattern"),
        ("run/checkpoint-*", 2, {"first": 2}, "and no other key"),
        ("run/checkpoint-*", 2, {"name": "run"}, "and no other key"),
    ],
)
def test_a_pattern_that_cannot_be_expanded_is_refused(
    pattern: str, last: object, keys: dict[str, object], line: str, tmp_path: Path
):
    run_of(tmp_path / "run", 1, 2, 3)
    file = averaged(tmp_path / "recipe.yaml", pattern, last, **keys)
    with pytest.raises(EvomergeError) as caught:
        load_recipe(file)
    first, second = str(caught.value).splitlines()
    assert first == f"{file}: not a recipe:"
    assert second.startswith("  sources: ")
    assert line in second


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.text("ru*?[]!-/.~\0{}\\1", max_size=8), last=st.integers(-1, 3) | st.none() | st.text(max_size=3))
def test_any_pattern_gives_a_recipe_or_a_refusal(pattern: str, last: object, tmp_path: Path):
    if not (tmp_path / "r1").exists():
        run_of(tmp_path / "r1", 1, 2)
    with suppress(EvomergeError):
        assert len(load_recipe(averaged(tmp_path / "recipe.yaml", pattern, last)).sources) == last


def test_checkpoints_are_for_files_only():
    with pytest.raises(ValueError, match="checkpoints"):
        Recipe.model_validate(
            {"method": "linear", "base": {"path": "/base"}, "sources": [{"checkpoints": "run/*", "last": 1}]}
        )


# --- Bad recipes ---


def source(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "path": f"/models/{name}"} | changes


def written(file: Path, **changes: Any) -> Path:
    good = {"method": "ties", "base": {"path": "/models/base"}, "sources": [source("one"), source("two")]}
    content = good | {"parameters": {"weight": 0.5}} | changes
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return file


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "mash"}, "method: 'mash' is not one of arcee_fusion, "),
    "no method": ({"method": None}, "method: Field required"),
    "unknown key": ({"methud": "ties"}, "methud: "),
    "unknown version": ({"recipe": 2}, "recipe: "),
    "unknown dtype": ({"dtype": "int8"}, "dtype: "),
    "negative seed": ({"seed": -1}, "seed: "),
    "seed of 64 bits": ({"seed": 2**63}, "seed: "),
    "no base": ({"base": None}, "base: Field required"),
    "no sources": ({"sources": []}, "sources: "),
    "source without path": ({"sources": [{"name": "one"}]}, "sources.0: needs a `path` or a `recipe`"),
    "source without name": ({"sources": [{"path": "/models/one"}]}, "sources.0.name: Field required"),
    "one name twice": ({"sources": [source("one"), source("one")]}, "sources: two have the same name"),
    "unknown knob": (
        {"parameters": {"weight": 1, "wait": 1}},
        "parameters.wait: not a coefficient of ties here; allowed: weight, density, lambda, normalize",
    ),
    "shared knob at a source": (
        {"sources": [source("one", parameters={"lambda": 1})]},
        "sources.one.parameters.lambda: not a coefficient of ties here; allowed: weight, density",
    ),
    "knob of another method": ({"parameters": {"weight": 1, "t": 0.5}}, "parameters.t: not a coefficient of ties"),
    "unknown choice": (
        {"method": "dare_ties", "parameters": {"weight": 1, "rescale": "l2"}},
        "parameters.rescale: 'l2' is not one of none, expected, l1",
    ),
    "a number for a choice": (
        {"method": "dare_ties", "parameters": {"weight": 1, "rescale": 0.5}},
        "parameters.rescale: not one of none, expected, l1, false, true",
    ),
    "a name for a number": ({"parameters": {"weight": "much"}}, "parameters.weight: 'much' is not a number"),
    "required knob missing": ({"parameters": {}}, "weight: must be given for one, two"),
    "required knob missing at one": (
        {"parameters": {}, "sources": [source("one", parameters={"weight": 1}), source("two")]},
        "weight: must be given for two",
    ),
    "above the range": ({"parameters": {"weight": 1, "density": 1.5}}, "parameters.density: 1.5 is outside 0 to 1"),
    "below the range": ({"parameters": {"weight": 1, "density": -0.1}}, "parameters.density: -0.1 is outside 0 to 1"),
    "one layer out of range": (
        {"parameters": {"weight": 1, "density": [0.5, 2.0]}},
        "parameters.density: 2.0 is outside 0 to 1",
    ),
    "one component out of range": (
        {"parameters": {"weight": 1, "density": {"mlp": [0.5, 3.0], "default": 1}}},
        "parameters.density: 3.0 is outside 0 to 1",
    ),
    "unknown component": (
        {"parameters": {"weight": {"brain": 1, "default": 1}}},
        "parameters.weight: 'brain' is not a component; allowed: attention, mixer, mlp, norm, embedding, head, "
        "vision, audio, projector, other, attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, "
        "mlp.down, default",
    ),
    "component without default": ({"parameters": {"weight": {"mlp": 1}}}, "parameters.weight: needs `default`"),
    "empty list": ({"parameters": {"weight": []}}, "parameters.weight: an empty list"),
    "empty list of a component": (
        {"parameters": {"weight": {"mlp": [], "default": 1}}},
        "parameters.weight: an empty list",
    ),
    "names without a default": (
        {"parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
        "parameters.weight: needs a last entry without `filter`",
    ),
    "a default before names": (
        {"parameters": {"weight": [{"value": 1}, {"filter": "mlp", "value": 1}, {"value": 2}]}},
        "parameters.weight: an entry without `filter` fits every tensor",
    ),
    "one name out of range": (
        {"parameters": {"weight": 1, "density": [{"filter": "mlp", "value": [0.5, 3.0]}, {"value": 1}]}},
        "parameters.density: 3.0 is outside 0 to 1",
    ),
    "an unknown key beside a name": (
        {"parameters": {"weight": [{"filtre": "mlp", "value": 1}, {"value": 1}]}},
        "parameters.weight",
    ),
    "an empty list of a name": (
        {"parameters": {"weight": [{"filter": "mlp", "value": []}, {"value": 1}]}},
        "parameters.weight: an empty list",
    ),
    "a word for a number": ({"parameters": {"weight": "much"}}, "parameters.weight"),
    "not a number": ({"parameters": {"weight": float("nan")}}, "parameters.weight"),
    "infinite": ({"parameters": {"weight": float("inf")}}, "parameters.weight"),
    "too many sources": (
        {"method": "passthrough", "parameters": {}, "sources": [source(n) for n in "abc"]},
        "sources: passthrough takes 1, here are 3",
    ),
    "decay below its range": (
        {"method": "checkpoint_average", "parameters": {"decay": 0.0}},
        "parameters.decay: 0.0 is outside 1e-06 to 1",
    ),
    "decay beside linear": (
        {"method": "checkpoint_average", "parameters": {"decay": {"mlp": 0.5, "default": 1.0}, "linear": True}},
        "parameters.decay: has no meaning beside linear; leave out one of them",
    ),
    "a knob of the uniform soup": (
        {"method": "uniform_soup"},
        "parameters.weight: not a coefficient of uniform_soup here; it has none",
    ),
    "slerp without t": ({"method": "slerp", "parameters": {}}, "t: must be given"),
}


@pytest.mark.parametrize(("changes", "line"), BAD.values(), ids=BAD)
def test_a_bad_recipe_is_refused_with_a_line_that_says_why(changes: dict[str, Any], line: str, tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", **changes)
    with pytest.raises(EvomergeError, match=re.escape(line)) as caught:
        load_recipe(file)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{file}: not a recipe:"
    assert all(re.match(r"  \S", x) and len(x) < 500 for x in rest)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", parameters={"wait": 1, "density": 2})
    with pytest.raises(EvomergeError) as caught:
        load_recipe(file)
    assert all(word in str(caught.value) for word in ("parameters.wait", "2.0 is outside", "weight: must be given"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"method: [", "not YAML"),
        (b"method: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"method: \xff\xfe", "cannot be read"),
        (b"seed: 2026-13-45", "not YAML"),
        (b"[" * 5000, "not YAML"),
        (b"", "not a recipe"),
        (b"just words", "not a recipe"),
        (b"- a\n- list", "not a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: bytes, line: str, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text)
    with pytest.raises(EvomergeError, match=f"^{re.escape(str(file))}: {line}"):
        load_recipe(file)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(EvomergeError, match=r"nowhere\.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_path_of_an_unknown_user_is_refused(tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", base={"path": "~nobody-of-this-name/base"})
    with pytest.raises(EvomergeError, match="nobody-of-this-name/base: no such folder"):
        with_fingerprints(load_recipe(file))


# --- Lists and layers ---


def recipe_with(method: str = "ties", sources: int = 2, **parameters: Coefficient) -> Recipe:
    statistics = "/statistics" if METHODS[method].statistics else None
    models = [RecipeSource(name=n, path=f"/models/{n}", statistics=statistics) for n in "abc"[:sources]]
    return Recipe(method=method, base=Model(path="/models/base"), sources=models, parameters=parameters)


@pytest.mark.parametrize(
    ("weight", "line"),
    [
        ([0.1, 0.2, 0.3], "parameters.weight: has 3 values, but the base model has 2 layers"),
        ({"mlp": [0.1], "default": 1.0}, "parameters.weight: has 1 values, but the base model has 2 layers"),
        ([FilteredValue(filter="mlp", value=[0.1]), FilteredValue(value=1.0)], "parameters.weight: has 1 values"),
    ],
)
def test_a_list_must_have_a_number_for_each_layer(weight: Coefficient, line: str):
    with pytest.raises(EvomergeError, match=re.escape(line)):
        check_layers(recipe_with(weight=weight), 2)


def test_a_list_of_the_wrong_length_at_a_source_is_named_and_nothing_is_merged(tmp_path: Path):
    paths = write_family(tmp_path, ["one"])
    bank = Bank(open_models(paths["base"], {"one": paths["one"]}))
    parameters: dict[str, Coefficient] = {"weight": [1.0] * (LAYERS + 1)}
    sources = [RecipeSource(name="one", path=str(paths["one"]), parameters=parameters)]
    recipe = Recipe(method="ties", base=Model(path=str(paths["base"])), sources=sources)
    with pytest.raises(EvomergeError, match=re.escape("sources.one.parameters.weight: has 3 values")):
        materialise(recipe, bank, {}, between=lambda: pytest.fail("began to merge"))


EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def weight_at(recipe: Recipe, tensor: str) -> tuple[float, ...]:
    return recipe.knobs(tensor_role(tensor), LAYERS).each["weight"]


def test_a_list_gives_each_layer_its_number_and_the_ends_the_nearest():
    recipe = recipe_with(weight=[0.1, 0.9])
    for tensor in llama_shapes():
        first = tensor == EMBEDDING or ".layers.0." in tensor
        assert weight_at(recipe, tensor) == ((0.1, 0.1) if first else (0.9, 0.9)), tensor


def test_each_component_has_its_number_and_the_rest_the_default():
    recipe = recipe_with(weight={"attention": 0.1, "embedding": 0.2, "head": [0.3, 0.4], "default": [0.5, 0.6]})
    expected = {
        EMBEDDING: 0.2,
        "model.layers.0.self_attn.q_proj.weight": 0.1,
        "model.layers.1.self_attn.o_proj.weight": 0.1,
        "model.layers.0.mlp.up_proj.weight": 0.5,
        "model.layers.1.mlp.up_proj.weight": 0.6,
        "model.layers.0.post_attention_layernorm.weight": 0.5,
        FINAL_NORM: 0.6,
        HEAD: 0.4,
    }
    assert {name: weight_at(recipe, name)[0] for name in expected} == expected


def test_a_linear_average_may_say_the_decay_that_means_nothing():
    assert recipe_with("checkpoint_average", decay=[1.0, 1.0], linear=True).parameters["linear"] is True


def test_the_first_part_whose_name_fits_decides():
    weight = [
        FilteredValue(filter="layers.0.mlp", value=0.1),
        FilteredValue(filter="mlp", value=[0.2, 0.3]),
        FilteredValue(filter=HEAD, value=0.4),
    ]
    recipe = recipe_with(weight=[*weight, FilteredValue(value=[0.5, 0.6])])
    expected = {
        EMBEDDING: 0.5,
        "model.layers.0.self_attn.q_proj.weight": 0.5,
        "model.layers.0.mlp.up_proj.weight": 0.1,
        "model.layers.1.mlp.up_proj.weight": 0.3,
        "model.layers.1.input_layernorm.weight": 0.6,
        FINAL_NORM: 0.6,
        HEAD: 0.4,
    }
    assert {name: weight_at(recipe, name)[0] for name in expected} == expected


def test_all_components_named_need_no_default():
    recipe = recipe_with(weight={c: float(i) for i, c in enumerate(COMPONENTS)})
    found = [recipe.knobs(TensorRole(0, c), LAYERS).each["weight"][0] for c in COMPONENTS]
    assert found == list(range(len(COMPONENTS)))


def test_a_source_overrides_the_common_value_and_silence_means_the_default():
    sources = [RecipeSource(name="a", path="/a", parameters={"weight": 0.25}), RecipeSource(name="b", path="/b")]
    recipe = Recipe(method="ties", base=Model(path="/base"), sources=sources, parameters={"weight": 0.75})
    knobs = recipe.knobs(tensor_role(HEAD), LAYERS)
    assert knobs.each == {"weight": (0.25, 0.75), "density": (1.0, 1.0)}
    assert knobs.shared == {"lambda": 1.0, "normalize": 1.0}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_least_and_most_sources_and_its_knobs_by_layer(method: str):
    knobs, excluded = METHODS[method].knobs, METHODS[method].excludes.values()
    named = {k for k, v in knobs.items() if v.switch or v.choices}
    parameters: dict[str, Coefficient] = {k: True if k in named else [0.25, 0.75] for k in knobs if k not in excluded}
    least, most = METHODS[method].sources
    for count in {least, most or least + 1}:
        found = recipe_with(method, count, **parameters).knobs(tensor_role(FINAL_NORM), LAYERS)
        assert found.each == {k: (0.75,) * count for k, v in knobs.items() if v.each}
        expected = {
            k: v.default if k in excluded else 1.0 if k in named else 0.75 for k, v in knobs.items() if not v.each
        }
        assert found.shared == expected
        assert found.count == count


@pytest.mark.parametrize(("given", "means"), [(False, 0.0), ("none", 0.0), (True, 1.0), ("expected", 1.0), ("l1", 2.0)])
def test_rescale_is_a_name_or_a_truth_value(given: Coefficient, means: float, tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", method="della", parameters={"weight": 1, "rescale": given})
    recipe = load_recipe(file)
    assert recipe.knobs(tensor_role(FINAL_NORM), LAYERS).shared["rescale"] == means
    assert f"rescale: {str(given).lower()}" in dump_recipe(recipe)


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path):
    file = written(tmp_path / "recipe.yaml", method="ram", parameters={"epsilon": "1e-5"})
    assert load_recipe(file).knobs(tensor_role(FINAL_NORM), LAYERS).shared == {"epsilon": 1e-5}


# --- Fingerprints ---


def test_inputs_that_changed_since_the_recipe_was_made_are_named(tmp_path: Path):
    paths = write_family(tmp_path, ["one"])
    base = Model(path=str(paths["base"]), sha256=model_fingerprint(paths["base"]))
    sources = [RecipeSource(name="one", path=str(paths["one"]), sha256=model_fingerprint(paths["one"]))]
    recipe = Recipe(method="linear", base=base, sources=sources)
    check_fingerprints(recipe)
    (paths["one"] / "config.json").write_text("{}")
    with pytest.raises(EvomergeError) as caught:
        check_fingerprints(recipe)
    assert str(caught.value).splitlines()[1:] == [f"  {paths['one'] / 'config.json'}"]
