"""`evomerge migrate`: files of mergekit-evolve and mergenetic become configurations that load, and that search."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import ROOT, finished_search, run_cli, verdict_of

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.start.migrate.migrate import migrate

TASKS = ROOT / "evals" / "tiny"

# The structure of the examples in both projects' documentation, with other names and values.
GENOME: dict[str, Any] = {
    "genome": {
        "models": ["lab/reader-3b", "lab/coder-3b@v2", "lab/plain-3b"],
        "merge_method": "ties",
        "base_model": "lab/plain-3b",
        "layer_granularity": 4,
        "normalize": True,
        "allow_negative_weights": False,
        "smooth": False,
        "filters": ["self_attn", "mlp"],
        "tokenizer_source": "base",
    },
    "tasks": [
        {"name": "riddles", "weight": 0.25, "metric": "exact_match,strict-match"},
        {"name": "trivia", "metric": "acc_norm,none"},
        "spelling",
    ],
    "limit": 60,
    "num_fewshot": 2,
    "shuffle": True,
}
LANGUAGES: dict[str, Any] = {
    "pop_size": 12,
    "n_iter": 5,
    "run_id": "three languages",
    "langs": ["fr", "es", "pt"],
    "models": {"fr": "lab/french", "es": "lab/spanish", "pt": "lab/plain"},
    "base_model": "lab/plain",
    "tasks": {
        "search": {"fr": "quiz_fr", "es": "quiz_es", "pt": "quiz_pt", "base": "quiz_pt"},
        "test": {"fr": "quiz_fr", "es": "exam_es", "pt": "quiz_pt"},
    },
    "metric": "acc",
    "mode": "gmpirt",
    "bench": "arc",
    "task_type": "MULTIPLECHOICE",
    "dtype": "float16",
    "seed": 7,
    "n_samples": 30,
    "device": "cuda:1",
    "eval_batch_size": 16,
    "path_to_store_config": "experiments/",
    "path_to_store_merged_model": "merged/",
    "additional_templates_folder": "my_tasks",
}
ONE_LANGUAGE: dict[str, Any] = {
    key: value for key, value in LANGUAGES.items() if key not in ("tasks", "additional_templates_folder", "metric")
} | {
    "langs": ["fr"],
    "models": {"fr": "lab/french"},
    "base_model": "lab/maths",
    "datasets": {"fr": "data/sums_fr.csv", "base": "data/sums_fr.csv"},
    "run_id": "sums-fr",
    "task_type": "FG_MATH",
}
LISTS: dict[str, Any] = {
    "run_id": "lists",
    "n_iter": 3,
    "pop_size": 4,
    "metric": "acc",
    "models": ["lab/french", "lab/spanish", "lab/plain"],
    "base_model": "lab/plain",
    "tasks": ["quiz_fr", "quiz_es"],
    "load_in_4bit": True,
}


def migrated(content: dict[str, Any], folder: Path, *task_folders: Path) -> tuple[SearchConfig, str]:
    """The configuration that becomes of a file with this content, and its text."""
    folder.mkdir(exist_ok=True)
    (old := folder / "old.yml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    migrate(old, folder / "new.yaml", task_folders)
    return load_config(folder / "new.yaml", files=False), (folder / "new.yaml").read_text(encoding="utf-8")


def test_a_file_of_mergekit_evolve(tmp_path: Path) -> None:
    config, text = migrated(GENOME, tmp_path)
    assert (config.base, config.method, config.vocabulary) == ("lab/plain-3b", "ties", "base")
    assert {s.name: s.path for s in config.sources} == {"reader-3b": "lab/reader-3b", "coder-3b": "lab/coder-3b@v2"}
    space = config.space.model_dump(exclude_defaults=True)
    assert (space["weight"]["low"], space["weight"]["high"]) == (0.0, 1.0)
    assert space["normalize"]["low"] == 1.0
    assert space["components"] == ["attention", "mlp"]
    assert config.space.granularity == "layer", "the number of groups cannot be told without the models"
    assert "groups: the number of layers / 4" in text.replace("\n  #", "")
    told = {t.task: (t.metric, t.weight, t.num_fewshot, t.apply_chat_template) for t in config.tasks}
    assert told == {
        "riddles": ("exact_match,strict-match", 0.25, 2, True),
        "trivia": ("acc_norm", 1.0, 2, True),
        "spelling": ("acc", 1.0, 2, True),
    }
    assert config.splits.search == 60
    assert config.budget.trials == 100
    assert "# - shuffle: true: items are always drawn at random" in text


def test_the_layers_of_a_model_on_this_machine_make_groups_or_knots(tmp_path: Path) -> None:
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    genome = GENOME["genome"] | {"models": ["one"], "base_model": "base"}
    spaces = {}
    for smooth in (False, True):
        config, _ = migrated(GENOME | {"genome": genome | {"smooth": smooth}}, tmp_path)
        (tmp_path / "new.yaml").unlink()
        spaces[smooth] = config.space
    assert (spaces[False].granularity, spaces[False].groups) == ("group", 3)
    assert (spaces[True].granularity, spaces[True].knots) == ("depth", 3)
    with pytest.raises(EvomergeError, match="the models have 12 layers, no multiple of 5"):
        migrated(GENOME | {"genome": genome | {"layer_granularity": 5}}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sources", "space"),
    [
        ({"merge_method": "slerp"}, ["coder-3b", "plain-3b"], {"t": [0, 1]}),
        (
            {"merge_method": "ties", "base_model": "lab/x", "models": ["lab/x", "lab/y", "lab/x"]},
            ["y"],
            {"weight": [0, 1]},
        ),
        ({"merge_method": "linear"}, ["reader-3b", "coder-3b", "plain-3b"], {"weight": [0, 1]}),
        (
            {"merge_method": "task_arithmetic", "base_model": "lab/plain-3b", "allow_negative_weights": True},
            ["reader-3b", "coder-3b"],
            {"weight": [-0.5, 1.5]},
        ),
        (
            {
                "merge_method": "dare_ties",
                "base_model": "lab/plain-3b",
                "models": ["lab/plain-3b+me/lora", "x/y+me/two"],
            },
            ["lora", "two"],
            {"weight": [0, 1], "density": [0.1, 1]},
        ),
    ],
)
def test_methods_of_mergekit_evolve(
    changes: dict[str, Any], sources: list[str], space: dict[str, list[float]], tmp_path: Path
) -> None:
    config, _ = migrated(GENOME | {"genome": {"models": GENOME["genome"]["models"]} | changes}, tmp_path)
    assert [s.name for s in config.sources] == sources
    axes = config.space.model_dump()
    assert {name: [axes[name]["low"], axes[name]["high"]] for name in space} == space
    adapters = {s.name: s.recipe.base.path if s.recipe else s.path for s in config.sources}
    if "lora" in sources:
        assert adapters == {"lora": "me/lora", "two": "x/y"}, "an adapter on another model is merged into that first"


def test_files_of_mergenetic(tmp_path: Path) -> None:
    config, text = migrated(LANGUAGES, tmp_path / "several")
    assert (config.name, config.base, config.method, config.goals) == (
        "three-languages",
        "lab/plain",
        "dare_ties",
        "pareto",
    )
    assert {s.name: s.path for s in config.sources} == {"fr": "lab/french", "es": "lab/spanish"}
    assert [(t.task, t.metric) for t in config.tasks] == [("quiz_fr", "acc"), ("quiz_es", "acc"), ("quiz_pt", "acc")]
    assert (config.budget.trials, config.seed, config.device, config.dtype) == (60, 7, "cuda:1", "float16")
    assert config.splits.search == 30
    for lost in ("bench", "mode", "eval_batch_size", "additional_templates_folder", "tasks.test.es, exam_es"):
        assert f"# - {lost}: " in text

    config, text = migrated(ONE_LANGUAGE, tmp_path / "one")
    assert (config.method, config.space.granularity, config.space.knots) == ("slerp", "depth", 5)
    assert config.goals == "mean"
    assert [t.task for t in config.tasks] == [str(tmp_path / "one" / "data" / "sums_fr.yaml")]
    assert "# evomerge new-task data/sums_fr.csv" in text

    config, _ = migrated(LISTS, tmp_path / "lists")
    assert ([s.name for s in config.sources], config.method, config.seed) == (["french", "spanish"], "dare_ties", 420)
    assert [t.task for t in config.tasks] == ["quiz_fr", "quiz_es"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"genome": GENOME["genome"] | {"filter": ["mlp"]}}, "genome.filter: unknown key; did you mean filters?"),
        ({"genome": GENOME["genome"], "task": []}, "task: unknown key; did you mean tasks?"),
        ({"genome": GENOME["genome"] | {"merge_method": "tie"}}, "no 'tie'; did you mean ties?"),
        ({"genome": GENOME["genome"] | {"base_model": None}}, "genome.base_model: missing; ties needs it"),
        (GENOME | {"limit": -1}, "limit: expected a whole number of 1 or more, found -1"),
        (GENOME | {"tasks": [{"name": "x", "weight": -1}]}, "every task is improved, so acc cannot be lowered"),
        (GENOME | {"tasks": [{"name": "x", "metric": None}]}, "tasks.0.metric: expected text, found None"),
        (LANGUAGES | {"n_itr": 5}, "n_itr: unknown key; did you mean n_iter?"),
        (LANGUAGES | {"models": {}}, "models: there is none besides the base model"),
        ({"merge_method": "ties", "models": []}, "is one merge of mergekit, not a search"),
        ({"base": "x", "sources": []}, "looks like a configuration or a recipe of evomerge already"),
        ({"population": 5}, "is neither a file of mergekit-evolve"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError) as error:
        migrated(content, tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "new.yaml").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (old := tmp_path / "genome.yml").write_text(yaml.safe_dump(GENOME), encoding="utf-8")
    with pytest.raises(EvomergeError, match="there is no folder"):
        migrate(old, tmp_path / "none" / "search.yaml")


def test_a_text_of_the_old_file_stays_within_its_comment(tmp_path: Path) -> None:
    """Whatever ends a line in YAML: a key that a stranger's file adds could run a command."""
    texts = [f"x{end}on_finish: {{command: touch /tmp/ran}}" for end in ("\n", "\r", "\x85", "\u2028")]
    config, text = migrated(GENOME | {"genome": GENOME["genome"] | {"filters": texts, texts[0]: 1}}, tmp_path)
    assert config.on_finish is None
    assert text.count("on_finish") == len(texts) + 1


def test_a_metric_may_be_named_with_the_filter_that_lm_eval_adds() -> None:
    (task,) = open_tasks([TaskConfig(task=str(TASKS / "rev.yaml"), metric="exact_match,none")])
    assert task.metric == "exact_match"
    with pytest.raises(EvomergeError, match="metric 'exact_match,strict' is not one of its metrics"):
        open_tasks([TaskConfig(task=str(TASKS / "rev.yaml"), metric="exact_match,strict")])


def test_a_migrated_search_runs(tiny_family: Path, tmp_path: Path) -> None:
    """With models and task files of this machine.  An unknown key is ignored, as there; no file is replaced."""
    genome = {
        "models": [str(tiny_family / s) for s in ("rev", "add")],
        "merge_method": "task_arithmetic",
        "base_model": str(tiny_family / "base"),
        "layer_granularity": 2,
        "filters": ["self_attn", "mlp"],
        "favourite_colour": "green",
    }
    tasks = [{"name": f"tiny_{s}", "metric": "exact_match,none"} for s in ("rev", "add")]
    content = {"genome": genome, "tasks": tasks, "limit": 12, "apply_chat_template": False}
    (old := tmp_path / "genome.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    new = tmp_path / "search.yaml"
    done = run_cli("migrate", old, "--out", new, "--task-search-path", TASKS)
    assert done.returncode == 0, done.stderr
    assert f"next: evomerge check {new}" in done.stdout
    assert "# - genome.favourite_colour: mergekit-evolve has no key of that name" in new.read_text()
    assert load_config(new).space.groups == 2
    again = run_cli("migrate", old, "--out", new)
    assert again.returncode == 2
    assert "exists already; choose another name with --out" in again.stderr
    short = new.read_text().replace("trials: 100}", "trials: 6}\nsampler: {name: cma-es}")
    new.write_text(short, encoding="utf-8")
    assert {c["name"] for c in verdict_of(finished_search(new))["comparisons"]} >= {"base", "uniform"}
