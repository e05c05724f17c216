"""`space.layers`: a search that chooses which source gives each layer of the output."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import llama_weights, write_family, write_tokenizer
from safetensors.torch import load_file
from searches import KILL, finished_search, run_cli, trials_of, verdict_of, write_config
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, PretrainedConfig, Qwen3MoeConfig

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.live import candidate_model
from evomerge.merge.live_layers import LiveLayers
from evomerge.merge.materialise import materialise
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, parse_recipe
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.samplers.registry import BUILT_IN
from evomerge.search.space.layer_assembly import SKIP, WRITERS, Assembly, Slot, build_assembly
from evomerge.search.space.space import Space, build_space
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.trial_record import TrialRecord, record_of
from evomerge.sources.tensor_names import tensor_role

EVERYTHING: dict[str, Any] = {"skip": True, "passes": 2, "range": [1, 3], "scale": [0.5, 1.5]}
DURING_A_MERGE = (
    KILL
    + """
import evomerge.search.evaluation.evaluator as e
calls, real = [0], e.materialise
def counted(*a, **k):
    calls[0] += 1
    if calls[0] == 12:
        die()
    return real(*a, **k)
e.materialise = counted
"""
)


def config_of(layers: dict[str, Any] | bool, folders: dict[str, Path] | None = None, **keys: Any) -> SearchConfig:
    folders = folders or {name: Path(f"/{name}") for name in ("base", "one", "two")}
    content = {
        "name": "x",
        "base": str(folders["base"]),
        "sources": [{"name": n, "path": str(f)} for n, f in folders.items() if n != "base"],
        "method": "passthrough",
        "space": {"layers": layers},
        "tasks": [{"task": "t"}],
        "dtype": "float32",
    }
    return SearchConfig.model_validate(content | keys)


@st.composite
def assemblies(draw: st.DrawFn) -> Assembly:
    """Any assembly that `build_assembly` could make, without models."""
    depth = draw(st.integers(1, 5))
    start = draw(st.integers(0, depth - 1))
    end = draw(st.integers(start + 1, depth))
    passes = draw(st.integers(1, 3))
    layers: dict[str, Any] = {"skip": draw(st.booleans()), "passes": passes}
    layers |= {"range": [start, end]} if passes > 1 else {}
    layers |= {"scale": [0.5, 1.5]} if draw(st.booleans()) else {}
    folders = {name: Path(f"/{name}") for name in ("base", "one", "two", "three")[: draw(st.integers(2, 4))]}
    slots = [Slot(k, 0) for k in range(start)]
    slots += [Slot(k, passed) for passed in range(passes) for k in range(start, end)]
    slots += [Slot(k, 0) for k in range(end, depth)]
    return Assembly(config_of(layers, folders), depth, tuple(slots))


@st.composite
def points(draw: st.DrawFn, assembly: Assembly) -> dict[str, Any]:
    return {
        name: draw(st.sampled_from(axis.choices) if hasattr(axis, "choices") else st.floats(axis.low, axis.high))
        for name, axis in assembly.distributions.items()
    }


def rows_of(recipe: Recipe, depth: int) -> list[tuple[str, int]]:
    """(source, its layer) of every layer of the output."""
    slices = [part.layers for part in recipe.slices] or [{recipe.sources[0].name: (0, depth)}]
    return [(name, at) for layers in slices for name, (start, end) in layers.items() for at in range(start, end)]


# --- Points and recipes ---


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_point_says_which_layers_there_are_and_the_recipe_leads_back_to_them(data: st.DataObject) -> None:
    assembly = data.draw(assemblies())
    point = data.draw(points(assembly))
    recipe = assembly.recipe(point)
    chosen = [(point.get(s.name, "one"), s.layer) for s in assembly.slots]
    expected = [(source, layer) for source, layer in chosen if source != SKIP]
    if expected:
        assert rows_of(recipe, assembly.layers) == expected
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), Path("/r.yaml")) == recipe
    back = assembly.point_of(recipe)
    assert back is not None
    assert assembly.recipe(back) == recipe


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_whole_source_is_a_recipe_without_slices(data: st.DataObject) -> None:
    assembly = data.draw(assemblies())
    for source in assembly.sources:
        recipe = assembly.recipe(assembly.whole(source))
        assert (recipe.slices, recipe.parameters, [s.name for s in recipe.sources]) == ([], {}, [source])


def recipe_with(slices: list[dict[str, list[int]]], **keys: Any) -> Recipe:
    names = dict.fromkeys(name for layers in slices for name in layers if name != "base")
    content = {"base": {"path": "/base"}, "sources": [{"name": n, "path": f"/{n}"} for n in names]}
    return Recipe.model_validate(
        {"method": "passthrough", "slices": [{"layers": s} for s in slices], **content, **keys}
    )


@pytest.mark.parametrize("recipe", [
    recipe_with([{"one": [0, 2]}, {"one": [1, 4]}]),
    recipe_with([{"one": [1, 4]}, {"one": [0, 1]}]),
    recipe_with([{"three": [0, 4]}]),
    recipe_with([{"one": [0, 2]}, {"base": [2, 4]}]),
    recipe_with([{"one": [0, 2], "two": [0, 2]}, {"one": [2, 4]}], method="linear"),
    recipe_with([{"one": [0, 2]}, {"two": [2, 4]}], parameters={"scale": 0.9}),
    recipe_with([{"one": [0, 2]}, {"two": [2, 4]}], parameters={"scale": {"attention.o": 0.9, "default": 1}}),
    recipe_with([{"one": [0, 2]}, {"two": [2, 4]}], parameters={"scale": dict.fromkeys(WRITERS, 9) | {"default": 1}}),
])  # fmt: skip
def test_what_the_space_cannot_say_has_no_point(recipe: Recipe) -> None:
    config = config_of({"skip": True, "scale": [0.5, 1.5]})
    assert Assembly(config, 4, tuple(Slot(k, 0) for k in range(4))).point_of(recipe) is None


def test_without_any_layer_the_last_one_stays() -> None:
    assembly = Assembly(config_of({"skip": True}), 3, tuple(Slot(k, 0) for k in range(3)))
    recipe = assembly.recipe({"embedding": "one", "head": "two"} | {f"layer{k}": SKIP for k in range(3)})
    assert rows_of(recipe, 3) == [("two", 2)]


# --- Models ---


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_family(tmp_path_factory.mktemp("family"), layers=4, change=0.3)


def copied(assembly: Assembly, point: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a point, copied by name and multiplied in float64 by the factor, which is float32 in a merge."""
    weights = {name: llama_weights(seed, change=0.3, layers=4) for seed, name in enumerate(("base", "one", "two"))}
    found = {"model.embed_tokens.weight": weights[point["embedding"]]["model.embed_tokens.weight"]}
    layer = 0
    for slot in assembly.slots:
        if point[slot.name] == SKIP:
            continue
        for name, tensor in weights[point[slot.name]].items():
            if name.startswith(f"model.layers.{slot.layer}."):
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                factor = point[f"scale.{slot.name}"] if writes else 1.0
                new = name.replace(f".{slot.layer}.", f".{layer}.", 1)
                found[new] = (tensor.double() * torch.tensor(factor).double()).float()
        layer += 1
    return found | {name: weights[point["head"]][name] for name in ("model.norm.weight", "lm_head.weight")}


def opened(config: SearchConfig) -> tuple[Assembly, LiveLayers]:
    """The layers of a search, and a live model with room for all of them."""
    models = open_config_models(config)
    assembly = build_assembly(config, models)
    assert assembly is not None
    bank = Bank(models, slices=assembly.deepest)
    return assembly, LiveLayers(candidate_model(bank, torch.float32), bank)


def placed(live: LiveLayers, recipe: Recipe) -> dict[str, Tensor]:
    """Merge a recipe into the live model; where its tensors are."""
    fitted, places = live.fit(recipe.slices)
    materialise(recipe, fitted, places)
    return dict(places)


@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_the_live_model_has_the_layers_of_every_point_one_after_the_other(
    data: st.DataObject, family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Deeper and shallower ones and one without slices, in any order: tensors by hand, logits of the exported model."""
    config = config_of(EVERYTHING, family)
    assembly, live = opened(config)
    tokens = torch.arange(3, 11)[None]
    for number in range(3):
        point = data.draw(points(assembly)) | {"layer0": "one"}
        recipe = assembly.recipe(point)
        places = placed(live, recipe)
        expected = copied(assembly, point)
        assert places.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(places[name], tensor), name
        out = tmp_path_factory.mktemp("out") / str(number)
        export(recipe, open_bank(recipe), out, model_card)
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(written[name], places[name]) for name in expected)
        with torch.inference_mode():
            exported = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
            assert torch.equal(live.model(tokens).logits, exported)
        mean = Recipe(method="linear", dtype="float32", base=recipe.base, sources=assembly.recipe(point).sources)
        plain, places = live.fit([])
        materialise(mean, plain, places)
        assert len({tensor_role(name).layer for name in places}) == 4 + 1


def test_a_skipped_layer_is_one_that_writes_nothing(family: dict[str, Path]) -> None:
    """x + 0 = x: the model without a layer computes what it computes with the layer's two last matrices at 0."""
    config = config_of({"skip": True}, family)
    assembly, live = opened(config)
    tokens = torch.arange(3, 11)[None]
    recipe = assembly.recipe(assembly.whole("one"))
    places = placed(live, recipe)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        places[f"model.layers.2.{name}.weight"].zero_()
    with torch.inference_mode():
        zeroed = live.model(tokens).logits.clone()
    recipe = assembly.recipe(assembly.whole("one") | {"layer2": SKIP})
    placed(live, recipe)
    with torch.inference_mode():
        assert torch.equal(live.model(tokens).logits, zeroed)


SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "sliding and full attention": Gemma2Config(**SMALL, **HEADS, sliding_window=4),
    "experts in some layers": Qwen3MoeConfig(
        **SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=2
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_several_kinds_keep_their_kind(kind: str, tmp_path: Path) -> None:
    settings: PretrainedConfig = KINDS[kind]
    folders = {}
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        folders[name] = tmp_path / name
        AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folders[name])
        write_tokenizer(folders[name])
    config = config_of({"skip": True, "passes": 2, "range": [0, 2]}, folders)
    assembly, live = opened(config)
    tokens = torch.arange(3, 19)[None]
    changes: list[dict[str, str]] = [
        {"layer0": SKIP},
        {"layer1": SKIP, "layer2": "two"},
        {"layer1.pass1": "two", "layer0": SKIP},
        {"layer0.pass1": "two", "layer1.pass1": "one"},
    ]
    for number, change in enumerate(changes):
        recipe = assembly.recipe(assembly.whole("one") | change)
        placed(live, recipe)
        export(recipe, open_bank(recipe), out := tmp_path / f"out{number}", model_card)
        with torch.inference_mode():
            exported = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
            assert torch.equal(live.model(tokens).logits, exported), change


def test_a_model_that_is_too_deep_is_refused(family: dict[str, Path]) -> None:
    config = config_of({"skip": True}, family)
    _, live = opened(config)
    with pytest.raises(EvomergeError, match="with 6 layers does not fit into the 4 layers"):
        live.fit(recipe_with([{"one": [0, 4]}, {"two": [2, 4]}]).slices)


# --- Samplers ---


def study_of(folder: Path, sampler: str, name: str) -> SearchStudy:
    config = config_of({"skip": True, "scale": [0.5, 1.5]}, sampler={"name": sampler}, seed=5)
    assembly = Assembly(config, 4, tuple(Slot(k, 0) for k in range(4)))
    return SearchStudy(
        open_study(sqlite_url(folder / f"{name}.db"), "s", create=True), Space(config, 4, (), (), {}, assembly)
    )


def value_at(point: dict[str, Any]) -> float:
    wanted = ["one", "two", "two", SKIP]
    right = sum(point[f"layer{k}"] == source for k, source in enumerate(wanted))
    return float(right - sum((point[f"scale.layer{k}"] - 0.8) ** 2 for k in range(4)))


def go_on(study: SearchStudy, count: int) -> list[dict[str, Any]]:
    found = []
    assert study.space.assembly is not None
    while len(study.finished) < count:
        number = len(study.finished)
        given = ("one", study.space.assembly.whole("one")) if number == 0 else None
        begun = study.begin(given)
        found.append(begun.params)
        study.finish(begun, value_at(begun.params), TrialRecord(items="i"))
    return found


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(name, marks=() if name == "cma-es" else pytest.mark.more) for name in BUILT_IN if name != "learned"],
)
def test_every_sampler_searches_choices_and_goes_on_as_if_never_stopped(sampler: str, tmp_path: Path) -> None:
    count = 14 if sampler == "gp" else 26
    whole = go_on(study_of(tmp_path, sampler, "whole"), count)
    parts = go_on(study_of(tmp_path, sampler, "parts"), count - 5)
    parts += go_on(study_of(tmp_path, sampler, "parts"), count)
    assert parts == whole
    for axis in ("layer0", "layer3", "head"):
        assert len({point[axis] for point in whole}) > 1, axis
    assert len({point["scale.layer1"] for point in whole}) > count / 2


def test_cma_es_finds_the_choices(tmp_path: Path) -> None:
    study = study_of(tmp_path, "cma-es", "s")
    go_on(study, 200)
    assert study.best is not None
    assert [study.best.params[f"layer{k}"] for k in range(4)] == ["one", "two", "two", SKIP]
    mean = study.distribution_mean()
    assert mean is not None
    assert value_at(mean) > 2.5  # the parent has 0.8


# --- Searches ---


def write_search(folder: Path, family: Path, layers: Any, **changes: Any) -> Path:
    sampler = {"name": "cma-es", "population": 4, "sigma0": 0.6}
    given = {"method": "passthrough", "space": {"layers": layers}, "sampler": sampler, "budget": {"trials": 14}}
    return write_config(folder, family, **given | changes)


@pytest.fixture(scope="module")
def undisturbed(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_search(tmp_path_factory.mktemp("layers"), tiny_family, EVERYTHING))


@pytest.mark.more
def test_a_search_for_layers_begins_with_the_parents_and_repeats_its_trials(undisturbed: Path, tmp_path: Path) -> None:
    trials = trials_of(undisturbed)
    assert [t[2]["layer0"] for t in trials[:2]] == ["rev", "add"]
    assert {t[1] for t in trials} == {"COMPLETE"}
    assert any(SKIP in (t[2]["layer0"], t[2]["layer3"]) for t in trials)
    assert any(t[2]["layer1.pass1"] != SKIP for t in trials)
    scored = [t for t in open_run(undisturbed).study().get_trials() if record_of(t).scores]  # the others are broken
    done = run_cli("repeat", undisturbed, "--trial", str(scored[-1].number))
    assert done.returncode == 0, done.stderr
    assert re.search(r"0 of \d+ item scores differ", done.stdout)


@pytest.mark.more
def test_a_killed_search_for_layers_resumes_to_the_same_trials_and_verdict(
    undisturbed: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_search(tmp_path, tiny_family, EVERYTHING)
    assert run_cli("search", config, "--run", run, prelude=DURING_A_MERGE).returncode == -signal.SIGKILL
    resumed = run_cli("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert trials_of(run) == trials_of(undisturbed)
    assert verdict_of(run) == verdict_of(undisturbed)


@pytest.mark.more
def test_any_trial_is_exported_and_written_for_mergekit(undisturbed: Path, tmp_path: Path) -> None:
    numbers = [t[0] for t in trials_of(undisturbed) if t[2]["layer1.pass1"] != SKIP]
    out, file = tmp_path / "out", tmp_path / "mergekit.yaml"
    done = run_cli("export", undisturbed, "--trial", str(numbers[-1]), "--out", out, "--mergekit", file)
    assert done.returncode == 0, done.stderr
    again = run_cli("reproduce", out / "recipe.yaml", "--out", tmp_path / "again", "--check", out)
    assert again.returncode == 0, again.stderr
    recipe, _ = load_merge(file)
    export(recipe, open_bank(recipe), tmp_path / "by mergekit", model_card)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "by mergekit"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_point_that_is_drawn_again_is_not_evaluated_again(tiny_family: Path, tmp_path: Path) -> None:
    config = write_search(tmp_path, tiny_family, {"skip": False}, sampler={"name": "random"}, budget={"trials": 60})
    run = finished_search(config)
    study = open_run(run).study()
    seen: dict[str, float | None] = {}
    drawn_again = 0
    for trial in study.get_trials():
        value = trial.user_attrs["record"]
        key = str(sorted(trial.params.items()))
        if key in seen and value.get("partial") is None:
            drawn_again += 1
            assert trial.value == seen[key]
            assert "forward" not in value["seconds"]
        elif value.get("partial") is None:
            seen[key] = trial.value
    assert drawn_again > 3


@pytest.mark.more
def test_a_search_starts_from_an_earlier_one_for_layers(undisturbed: Path, tiny_family: Path, tmp_path: Path) -> None:
    best = max(trials_of(undisturbed), key=lambda t: t[3] or -9.0)
    config = write_search(tmp_path, tiny_family, EVERYTHING | {"passes": 3}, start_from=str(undisturbed))
    run = finished_search(config)
    space = build_space(load_config(config), open_config_models(load_config(config)))
    began = [space.recipe(t[2]) for t in trials_of(run)[:6]]
    earlier = load_config(undisturbed / "config.yaml")
    assert build_space(earlier, open_config_models(earlier)).recipe(best[2]) in began
    other = write_config(tmp_path, tiny_family, start_from=str(undisturbed))
    done = run_cli("search", other, "--run", tmp_path / "other")
    assert done.returncode == 2
    assert "was a search for layers" in done.stderr


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"method": "linear"}, "space.layers: needs `method: passthrough`"),
    "several methods": ({"method": ["passthrough", "ties"]}, "here is ties"),
    "a coefficient": (
        {"space": {"layers": True, "scale": [0, 1]}},
        "space.scale: cannot stand beside space.layers; give",
    ),
    "a granularity": ({"space": {"layers": True, "granularity": "layer"}}, "space.granularity: cannot stand beside"),
    "an unknown key": ({"space": {"layers": {"skips": True}}}, "space.layers.skips: unknown key"),
    "an empty range": ({"space": {"layers": {"passes": 2, "range": [2, 2]}}}, "range: [2, 2] has no layer"),
    "a range for nothing": ({"space": {"layers": {"range": [1, 2]}}}, "it needs `passes: 2` or more"),
    "a range beyond the model": (
        {"space": {"layers": {"passes": 2, "range": [1, 9]}}},
        "space.layers.range: [1, 9] goes beyond the 4 layers",
    ),
    "bounds in disorder": ({"space": {"layers": {"scale": [1.5, 0.5]}}}, "scale: give bounds [low, high]"),
    "nothing to search": ({"sources": "first"}, "there is nothing to search"),
    "simplify": ({"simplify": 0.02}, "simplify: there are no coefficients"),
    "learned": ({"sampler": {"name": "learned"}}, "sampler: learned: a choice of layers has no derivative"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_search_for_layers_is_refused_with_one_message(case: str, tiny_family: Path, tmp_path: Path) -> None:
    changes, line = WRONG[case]
    if changes.get("sources") == "first":
        changes = {"sources": [{"name": "rev", "path": str(tiny_family / "rev")}]}
    done = run_cli(
        "search", write_search(tmp_path, tiny_family, **{"layers": True} | changes), "--run", tmp_path / "run"
    )
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr
