"""All problems of a configuration file are reported in one error, and no other type of error is raised."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.config.config_file import dump_config, load_config, parse_config
from evomerge.config.differences import config_differences
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import is_named

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
DEFAULT = object()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three models (empty folders are enough: nothing is opened) and a task file."""
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "task.yaml").write_text("task: x\n")
    return tmp_path


def written(**changes: object) -> dict[str, Any]:
    """A correct configuration with some keys replaced; DEFAULT leaves a key out."""
    content: dict[str, Any] = {
        "name": "test",
        "base": "base",
        "sources": [{"name": "one", "path": "one"}, {"name": "two", "path": "two"}],
        "method": "task_arithmetic",
        "space": {"weight": [0, 1]},
        "tasks": [{"task": "task.yaml"}],
    } | changes
    return {key: value for key, value in content.items() if value is not DEFAULT}


def parsed(folder: Path, **changes: object) -> SearchConfig:
    return parse_config(written(**changes), folder / "search.yaml")


def problems(folder: Path, **changes: object) -> list[str]:
    """The lines of the error that a configuration with these changes raises."""
    with pytest.raises(EvomergeError) as caught:
        parsed(folder, **changes)
    first, *lines = str(caught.value).split("\n  ")
    assert first == f"{folder / 'search.yaml'}: {len(lines)} problem(s):"
    return lines


def test_a_correct_file_has_absolute_paths_and_the_defaults(folder: Path) -> None:
    config = parsed(folder)
    assert config.base == str(folder / "base")
    assert config.tasks[0].task == str(folder / "task.yaml")
    assert config.sampler.name == "auto"
    assert config.budget.most == 100
    assert (config.splits.search, config.splits.selection, config.splits.holdout) == (0.4, 0.2, 0.4)


def test_hub_ids_and_names_of_lm_eval_tasks_stay_as_they_are(folder: Path) -> None:
    config = parsed(folder, base="owner/model@main", tasks=[{"task": "hellaswag"}])
    assert config.base == "owner/model@main"
    assert config.tasks[0].task == "hellaswag"


def test_a_folder_that_looks_like_a_hub_id_is_a_folder_if_it_exists(folder: Path) -> None:
    (folder / "models" / "base").mkdir(parents=True)
    assert parsed(folder, base="models/base").base == str(folder / "models" / "base")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"space": {"weight": [0, 1], "wieght": [0, 1]}}, "space.wieght: not a coefficient of task_arithmetic"),
        ({"sources": [{"name": "one", "path": "one", "rank": 1}]}, "sources.0.rank: unknown key"),
        ({"method": DEFAULT}, "method: missing"),
        ({"tasks": [{"weight": 2}]}, "tasks.0.task: missing"),
        ({"tasks": 3}, "tasks: Input should be a valid list (found 3)"),
        ({"name": "a b"}, "name: String should match"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (found -1)"),
        ({"dtype": "int8"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16' (found 'int8')"),
        ({"sampler": {"name": "gp", "sigma0": 2}}, "sampler.sigma0: Input should be less than or equal to 1"),
        ({"sources": []}, "sources: List should have at least 1 item"),
        ({"base": "nowhere"}, "base: no such folder: /"),
        ({"base": "a\0b"}, "base: no such folder: a\0b"),
        ({"base": "x" * 300}, "base: no such folder: /"),
        ({"sources": [{"name": "one", "path": "gone"}]}, "sources.0.path: no such folder: /"),
        ({"tasks": [{"task": "gone.yaml"}]}, "tasks.0.task: no such file: /"),
        ({"baselines": ["gone.yaml"]}, "baselines.0: no such file: /"),
        ({"baselines": ["a\0b"]}, "baselines.0: no such file: a\0b"),
        ({"baselines": [3]}, "baselines.0: Input should be a valid string (found 3)"),
        ({"tasks": [{"task": "a\0b.yaml"}]}, "tasks.0.task: no such file: a\0b.yaml"),
        ({"tasks": [{"task": "task.yaml"}, {"task": "./task.yaml"}]}, "tasks: /"),
        ({"space": {"weight": [1, 0]}}, "space.weight: impossible bounds: low 1 is above high 0"),
        ({"space": {"weight": [0, float("nan")]}}, "space.weight.high: Input should be a finite number"),
        ({"space": {"weight": [0, float("inf")]}}, "space.weight.high: Input should be a finite number"),
        ({"space": {"weight": [0, 1, 2]}}, "space.weight: Input should be"),
        ({"space": {"weight": {"low": 0, "high": 1, "granularity": "word"}}}, "space.weight.granularity: Input"),
        ({"space": {"weight": {"low": 0, "high": 1, "components": ["nose"]}}}, "space.weight.components.0: Input"),
        ({"space": {"weight": [0, 1], "knots": 1}}, "space.knots: Input should be greater than or equal to 2"),
        ({"method": "average"}, "method: 'average' is not one of arcee_fusion, "),
        ({"space": {"weight": [0, 1], "t": 0.5}}, "space.t: not a coefficient of task_arithmetic; allowed: weight,"),
        ({"space": {"weight": 1}}, "space: every coefficient is fixed, there is nothing to search"),
        ({"space": {}}, "space.weight: task_arithmetic needs it; give bounds [low, high] or a number"),
        ({"space": {"weight": [0, 1], "sources": {"six": {"weight": 1}}}}, "space.sources.six: there is no source of"),
        ({"space": {"weight": [0, 1], "sources": {"one": {"lambda": 1}}}}, "space.sources.one.lambda: not a coeffic"),
        ({"method": "slerp", "space": {"t": [0, 2]}}, "space.t: bounds 0 to 2 are not within 0 to 1"),
        ({"method": "ties", "space": {"weight": 1, "density": [0, 1]}}, "space.density: a density of 0 keeps nothing"),
        ({"method": "uniform_soup", "space": {}}, "space: every coefficient is fixed, there is nothing to search"),
        ({"method": "uniform_soup"}, "space.weight: not a coefficient of uniform_soup; it has none"),
        (
            {"method": "checkpoint_average", "space": {"decay": [0.5, 1], "linear": True}},
            "space.decay: has no meaning beside linear; leave out one of them",
        ),
        ({"sources": [{"name": "one", "path": "one"}] * 2}, "sources: the name 'one' is used twice"),
    ],
)
def test_one_mistake_is_one_line_that_begins_with_its_yaml_path(
    folder: Path, changes: dict[str, object], line: str
) -> None:
    (found,) = problems(folder, **changes)
    assert found.startswith(line)


def test_all_problems_of_a_file_are_reported_together(folder: Path) -> None:
    found = problems(
        folder,
        colour="red",
        base="nowhere",
        sources=[{"name": "one", "path": "gone"}, {"name": "one", "path": "two"}],
        method="average",
        tasks=[{"task": "gone.yaml"}],
        seed="many",
        splits={"search": 0.9, "holdout": 0.9},
        budget={"timeout": "soon"},
    )
    assert sorted(line.split(":")[0] for line in found) == [
        "base", "budget.timeout", "colour", "method", "seed", "sources", "sources.0.path", "splits", "tasks.0.task",
    ]  # fmt: skip


def test_knobs_of_another_method_are_reported_beside_wrong_types(folder: Path) -> None:
    found = problems(folder, space={"weight": [0, 1], "t": 1}, seed="many")
    assert [line.split(":")[0] for line in found] == ["seed", "space.t"]


def test_passthrough_takes_no_more_than_one_source(folder: Path) -> None:
    sources = [{"name": name, "path": "one"} for name in "abc"]
    assert problems(folder, method="passthrough", space={"scale": [0, 1]}, sources=sources) == [
        "sources: passthrough takes 1, here are 3"
    ]


def test_the_order_alone_can_be_searched(folder: Path) -> None:
    sources = [{"name": name, "path": "one"} for name in "abc"]
    assert parsed(folder, method="arcee_fusion", space={}, sources=sources).space.order
    assert parsed(folder, method="slerp", space={"t": 0.5}, sources=sources).space.order
    for method, count, space in (("slerp", 2, {"t": 0.5}), ("slerp", 3, {"t": 0.5, "order": False})):
        assert "nothing to search" in " ".join(problems(folder, method=method, space=space, sources=sources[:count]))


def test_a_weight_given_for_every_source_is_enough(folder: Path) -> None:
    config = parsed(folder, space={"sources": {"one": {"weight": [0, 1]}, "two": {"weight": 0.5}}})
    assert config.space.sources["two"]["weight"].high == 0.5
    assert len(problems(folder, space={"sources": {"one": {"weight": [0, 1]}}})) == 1


@pytest.mark.parametrize(
    ("splits", "line"),
    [
        ({"search": 0.5, "selection": 0.3, "holdout": 0.3}, "splits: the shares add up to 1.1, which is more than 1"),
        ({"search": "test", "holdout": "test"}, "splits: two splits use the task's split 'test'"),
        ({"search": 0}, "splits.search: give a count of 1 or more"),
        ({"search": -0.1}, "splits.search: give a count of 1 or more"),
        ({"search": 1.0}, "splits.search: give a count of 1 or more"),  # everything, or one item?  Nobody can tell
        ({"search": True}, "splits.search: give a count of 1 or more"),
        ({"search": "dev"}, "splits.search: give a count of 1 or more"),
        ({"search": [1]}, "splits.search: give a count of 1 or more"),
    ],
)
def test_impossible_splits(folder: Path, splits: dict[str, object], line: str) -> None:
    (found,) = problems(folder, splits=splits)
    assert found.startswith(line)


def test_counts_shares_and_names_of_splits_go_together(folder: Path) -> None:
    splits = parsed(folder, splits={"search": 100, "selection": 0.5, "holdout": "test"}).splits
    assert (splits.search, splits.selection, splits.holdout) == (100, 0.5, "test")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28800), ("90m", 5400), ("45s", 45), ("1h30m", 5400), ("1h2m3s", 3723), ("7", 7), (2.5, 2.5)],
)
def test_durations(folder: Path, text: object, seconds: float) -> None:
    assert parsed(folder, budget={"timeout": text}).budget.timeout == seconds


@pytest.mark.parametrize("text", ["", "soon", "8 hours", "30m1h", "-8h", "0h", -1, 0, "9" * 400 + "h", [8]])
def test_what_is_not_a_duration(folder: Path, text: object) -> None:
    (found,) = problems(folder, budget={"timeout": text})
    assert found.startswith("budget.timeout: ")


def test_a_budget_of_time_alone_does_not_bound_the_trials(folder: Path) -> None:
    assert parsed(folder, budget={"timeout": "1h"}).budget.trials is None


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: !!python/object/apply:os.system [ls]",
        "a: 2024-02-31",
        "a: 0x_",
        "[" * 3000,
        "- 1",
        "",
        "just words",
        "space: {weight: 1" + "0" * 400 + "}",
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(EvomergeError, match=r"search\.yaml: "):
        load_config(path)


def test_a_missing_or_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match=r"gone\.yaml: no such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(EvomergeError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(EvomergeError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


# Round trip

unit = st.floats(0.01, 1)


names = st.text("abcXYZ019_-", min_size=1, max_size=8)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Correct configurations of every method, with all that a file may say."""
    method = draw(st.sampled_from(sorted(n for n, m in METHODS.items() if not all(map(is_named, m.knobs.values())))))
    knobs, excludes = METHODS[method].knobs, METHODS[method].excludes
    least, most = METHODS[method].sources
    sources = draw(st.lists(names, min_size=least, max_size=min(max(2, least), most or least + 1), unique=True))
    components = st.lists(st.sampled_from(["attention", "mlp", "norm"]), max_size=2, unique=True)
    granularity = st.sampled_from(["model", "depth", "group", "layer"])

    def bounds() -> object:
        low, high = sorted((draw(unit), draw(unit)))
        short: object = draw(st.sampled_from([low, [low, high]]))
        full = {"low": low, "high": high, "granularity": draw(granularity), "components": draw(components)}
        return draw(st.sampled_from([short, full]))

    space: dict[str, Any] = {"granularity": draw(granularity), "components": draw(components)}
    for name, knob in knobs.items():
        space[name] = draw(st.booleans()) and name not in excludes if knob.switch else bounds()
        if knob.choices:
            space[name] = draw(st.booleans() | st.sampled_from(list(knob.choices)))
    moving = next(name for name, knob in knobs.items() if not is_named(knob))
    space[moving] = [0.25, 0.75]
    if knobs[moving].each and draw(st.booleans()):
        space["sources"] = {sources[0]: {moving: bounds()}}
    return {
        "name": draw(names),
        "base": draw(st.sampled_from(["base", "owner/model", "owner/model@v1"])),
        "sources": [
            {"name": n, "path": "one", "role": draw(st.sampled_from([None, "specialist"])), "statistics": "task.yaml"}
            for n in sources
        ],
        "method": method,
        "space": space,
        "tasks": [
            {
                "task": draw(st.sampled_from(["task.yaml", "hellaswag"])),
                "weight": draw(unit),
                "objective": draw(st.sampled_from(["auto", "gold_prob"])),
                "gold": draw(st.none() | st.text(max_size=10)),
                "num_fewshot": draw(st.none() | st.integers(0, 5)),
            }
        ],
        "splits": {"search": draw(st.sampled_from([0.25, 10, "train"])), "selection": 0.1, "holdout": 20},
        "sampler": {"name": draw(st.sampled_from(["tpe", "cma-es"])), "sigma0": draw(unit)},
        "budget": draw(st.sampled_from([{}, {"trials": 7}, {"timeout": "1h30m"}, {"trials": 3, "timeout": 1.5}])),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "storage": draw(st.none() | st.text(max_size=10)),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configurations(), st.sets(st.sampled_from(["splits", "sampler", "budget", "seed", "storage"])))
def test_a_dumped_configuration_reads_back_as_the_same(folder: Path, content: dict[str, Any], silent: set[str]) -> None:
    config = parse_config({k: v for k, v in content.items() if k not in silent}, folder / "search.yaml")
    elsewhere = folder / "run" / "config.yaml"
    elsewhere.parent.mkdir(exist_ok=True)
    elsewhere.write_text(dump_config(config), encoding="utf-8")
    assert load_config(elsewhere) == config


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates()
odd = st.just(10**400) | st.sampled_from(["~nosuchuser/x", "a\0", "x" * 5000, "owner/model", "9" * 30 + "h", ".."])
keys = st.sampled_from(
    [*SearchConfig.model_fields, "path", "weight", "lambda", "t", "density", "task", "low", "high", "search", "trials",
     "timeout", "normalize", "sources", "components", "one"]
)  # fmt: skip
trees = st.recursive(
    scalars | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys | scalars, trees, max_size=8), st.booleans())
def test_arbitrary_yaml_raises_nothing_but_evomerge_errors(
    folder: Path, content: dict[Any, Any], complete: bool
) -> None:
    content = written(**{k: v for k, v in content.items() if isinstance(k, str)}) if complete else content
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with suppress(EvomergeError):
        load_config(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_arbitrary_text_raises_nothing_but_evomerge_errors(folder: Path, text: str | bytes) -> None:
    path = folder / "search.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(EvomergeError):
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_we_ship_is_correct_but_for_models_not_made_yet(path: Path) -> None:
    try:
        load_config(path)
        message = ""
    except EvomergeError as error:
        message = str(error)
    summary, *lines = message.split("\n  ")
    assert lines or not summary
    assert [line for line in lines if ": no such folder: " not in line] == []


def test_we_ship_configurations() -> None:
    assert CONFIGS


# Differences


def test_differences_name_the_key_and_both_values(folder: Path) -> None:
    old = parsed(folder, seed=1, space={"weight": [0, 1], "lambda": 1})
    new = parsed(folder, seed=2, space={"weight": [0, 1.5], "lambda": 1})
    assert config_differences(old, new) == ["seed: 1 -> 2", "space.weight.high: 1.0 -> 1.5"]


def test_differences_use_the_names_of_the_file_and_say_what_is_absent(folder: Path) -> None:
    old = parsed(folder)
    new = parsed(folder, space={"weight": [0, 1], "lambda": 1}, sources=written()["sources"][:1])
    assert config_differences(old, new) == [
        "sources.1.name: two -> (absent)",
        f"sources.1.path: {folder / 'two'} -> (absent)",
        "space.lambda.high: (absent) -> 1.0",
        "space.lambda.low: (absent) -> 1.0",
    ]


def test_a_longer_budget_is_no_difference(folder: Path) -> None:
    assert config_differences(parsed(folder), parsed(folder, budget={"trials": 500})) == []


@pytest.mark.parametrize("name", ["base", "winner"])
def test_a_source_is_not_called_as_another_model_of_the_tables(folder: Path, name: str) -> None:
    """One called `base` took the base's place, one called `winner` the candidate's."""
    sources = [{"name": name, "path": str(folder / "a")}]
    with pytest.raises(EvomergeError, match=f"sources.0.name: '{name}' is the name of another model in tables"):
        parsed(folder, sources=sources)


def test_a_search_that_starts_from_its_own_folder_is_refused(folder: Path) -> None:
    own = folder / "config.yaml"
    own.write_text(yaml.safe_dump(written(base=DEFAULT, start_from=".")))
    with pytest.raises(EvomergeError, match=r"is no run folder \(its config.yaml lacks base\)"):
        load_config(own)


def test_links_in_a_circle_are_no_folder(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    assert problems(folder, base="./circle") == ["base: no such folder: ./circle"]
