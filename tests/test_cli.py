"""The command line as a user meets it: what it prints, how it refuses, what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models import write_family, write_llama
from safetensors.torch import load_file, save_file
from searches import ROOT, Done, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.merge.methods import METHODS
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import objective_scores


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search over two tiny specialists."""
    return finished_search(write_config(tmp_path_factory.mktemp("finished"), tiny_family, budget={"trials": 12}))


def refuses(done: Done, *words: str) -> None:
    """Exit code 2, the words in one message, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback (most recent" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_search_ends_with_a_verdict_a_report_and_a_recipe(finished: Path) -> None:
    verdict = verdict_of(finished)
    assert {c["name"] for c in verdict["comparisons"]} >= {"base", "rev", "add", "uniform"}
    selected = [f["name"] for f in verdict["finalists"] if f["kind"] != "candidate"]
    assert {c["name"] for c in verdict["comparisons"]} <= set(selected), "baselines meet the candidates on selection"
    assert verdict["comparisons"][0]["name"] == selected[0]
    assert verdict["recommended"] in ("winner", selected[0])
    report = (finished / "report.html").read_text()
    headline, _, why = verdict["sentence"].partition(": ")
    assert f"<h2>{headline}</h2>" in report
    assert why.split("(")[0][1:] in report.replace("&#x27;", "'")
    assert "https://" not in report.split("<script")[0]
    assert yaml.safe_load((finished / "recommended.yaml").read_text())["method"]
    items = [t["items"] for t in verdict["tasks"].values()]
    assert items == [{"holdout": 40, "selection": 10, "search": 12}] * 2


def test_the_manifest_names_every_input_and_version(finished: Path) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    assert set(manifest["inputs"]) == {"base", "rev", "add"}
    assert len(manifest["inputs"]["rev"]["model.safetensors"]) == 64
    assert manifest["packages"]["torch"]


def test_status_shows_best_trials_rate_and_timing(finished: Path) -> None:
    done = run_cli("status", finished, "--timing")
    assert done.returncode == 0
    assert "12 of 12 finished" in done.stdout
    assert "trials per minute" in done.stdout
    assert "outside model forwards" in done.stdout
    assert "best trial  best parent" in done.stdout
    assert "the mean of the first row minus that of this row" in done.stdout.replace("\n", " ")
    told = json.loads(run_cli("status", finished, "--json").stdout)
    assert told["trials"]["finished"] == 12
    assert {t["task"] for t in told["tasks"]} == set(told["verdict"]["tasks"])
    assert all(t["parent_name"] in told["sources"] for t in told["tasks"])
    assert run_cli("status", finished, "--json", "--watch").returncode == 2


def test_an_exported_model_scores_what_the_search_said(finished: Path, tmp_path: Path) -> None:
    """The live candidate and the exported files are the same model; only the batches differ, by the race's chunks."""
    best = max((t for t in trials_of(finished) if t[1] == "COMPLETE"), key=lambda t: t[3] or 0.0)
    assert run_cli("export", finished, "--out", tmp_path / "m", "--trial", str(best[0])).returncode == 0
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config |= {"name": "again", "base": str(tmp_path / "m"), "method": "linear", "space": {"weight": [0.5, 1]}}
    config |= {"sources": [{"name": "same", "path": str(tmp_path / "m")}], "budget": {"trials": 1}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert run_cli("search", tmp_path / "again.yaml", "--run", tmp_path / "run").returncode == 0
    assert objective_of(tmp_path / "run", 0) == pytest.approx(objective_of(finished, best[0]), abs=1e-5)


def objective_of(run: Path, number: int) -> float:
    """The mean item score of a trial's objective, over all tasks."""
    scores = objective_scores(open_run(run).study().trials[number])
    return float(np.mean([np.mean(of_task) for of_task in scores.values()]))


def test_the_exported_folder_opens_and_its_card_says_how_to_make_it_again(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    assert run_cli("export", finished, "--out", out).returncode == 0
    AutoModelForCausalLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)) > 10
    card = (out / "README.md").read_text()
    assert "evomerge reproduce" in card
    assert "90% intervals" in card
    assert "apache-2.0" in card


def test_reproduce_names_the_tensor_that_differs(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert run_cli("export", finished, "--out", out).returncode == 0
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"][3] += 1.0
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    done = run_cli("reproduce", out / "recipe.yaml", "--out", tmp_path / "again", "--check", out)
    assert done.returncode == 1
    assert "model.norm.weight" in done.stdout


def test_reproduce_refuses_other_inputs(tmp_path: Path) -> None:
    family = write_family(tmp_path, ("one", "two"))
    recipe = {
        "method": "linear",
        "base": {"path": str(family["base"])},
        "sources": [{"name": n, "path": str(family[n]), "parameters": {"weight": 1.0}} for n in ("one", "two")],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run_cli("merge", tmp_path / "r.yaml", "--out", tmp_path / "out").returncode == 0
    shutil.copy(family["two"] / "model.safetensors", family["one"] / "model.safetensors")
    done = run_cli("reproduce", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again")
    refuses(done, "not the files that the recipe was made with", "model.safetensors")


def test_merge_averages_the_last_checkpoints_of_a_run(tmp_path: Path) -> None:
    write_llama(tmp_path / "base")
    for seed, step in enumerate((1000, 50, 900, 950), 1):
        write_llama(tmp_path / "run" / f"checkpoint-{step}", seed)
    (tmp_path / "run" / "checkpoint-1050").mkdir()  # begun, but nothing is in it yet
    recipe = {
        "method": "checkpoint_average",
        "dtype": "float32",
        "base": {"path": "base"},
        "sources": [{"checkpoints": "run/checkpoint-*", "last": 3}],
        "parameters": {"linear": True},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out, used = tmp_path / "out", ["checkpoint-900", "checkpoint-950", "checkpoint-1000"]
    done = run_cli("merge", tmp_path / "r.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    merged = load_file(out / "model.safetensors")
    one, two, three = (load_file(tmp_path / "run" / name / "model.safetensors") for name in used)
    for name in one:
        assert torch.allclose(merged[name], (one[name] + 2 * two[name] + 3 * three[name]) / 6, atol=1e-7), name
    assert [s["name"] for s in yaml.safe_load((out / "recipe.yaml").read_text())["sources"]] == used
    again = run_cli("reproduce", out / "recipe.yaml", "--out", tmp_path / "again", "--check", out)
    assert again.returncode == 0, again.stdout


def test_a_mergekit_file_is_merged_and_a_recipe_becomes_one(tmp_path: Path) -> None:
    write_family(tmp_path, ("one", "two"))
    content = {"merge_method": "ties", "base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
    parameters = {"weight": [0.2, 0.8], "density": 0.5, "int8_mask": True}
    (tmp_path / "mergekit.yml").write_text(yaml.safe_dump(content | {"parameters": parameters}))
    first, second = tmp_path / "first", tmp_path / "second"
    done = run_cli("merge", tmp_path / "mergekit.yml", "--out", first)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: int8_mask: has no effect in ties; ignored, as in mergekit\n"
    done = run_cli("merge", first / "recipe.yaml", "--mergekit", tmp_path / "again.yml")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'again.yml'}\n"), done.stderr
    assert run_cli("merge", tmp_path / "again.yml", "--out", second).returncode == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_run_is_exported_for_mergekit(finished: Path, tmp_path: Path) -> None:
    assert run_cli("export", finished, "--mergekit", tmp_path / "winner.yml").returncode == 0
    assert yaml.safe_load((tmp_path / "winner.yml").read_text())["merge_method"] in METHODS
    refuses(run_cli("export", finished), "--out FOLDER", "--mergekit FILE")


def test_evaluate_prints_lm_evals_metrics_and_writes_items(tiny_family: Path, tmp_path: Path) -> None:
    task = ROOT / "evals" / "tiny" / "choice.yaml"
    out = tmp_path / "scores.json"
    done = run_cli("evaluate", tiny_family / "sort", "--tasks", task, "--limit", "20", "--output", out)
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())
    (result,) = scores.values()
    assert result["items"] == 20
    assert len(result["per_item"]["acc"]) == 20
    assert result["metrics"]["acc"] == sum(result["per_item"]["acc"]) / 20
    for answer, right in zip(result["answers"], result["per_item"]["acc"], strict=True):
        assert (answer["text"] == answer["gold"]) == bool(right)


def test_inspect_shows_distances_and_refuses_another_architecture(tiny_family: Path, tmp_path: Path) -> None:
    done = run_cli("inspect", tiny_family / "base", tiny_family / "rev", tiny_family / "add")
    assert done.returncode == 0
    assert "can be merged" in done.stdout
    assert "Cosine between the changes" in done.stdout
    assert "the sources hardly touch each other" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = json.loads(run_cli("inspect", tiny_family / "base", tiny_family / "rev", "--json").stdout)
    assert found["strangers"] == []
    assert 0 < found["distances"]["rev"]["mlp"] < 0.2
    stranger = write_family(tmp_path, ("one",))["one"]
    done = run_cli("inspect", tiny_family / "base", stranger)
    assert done.returncode == 2
    assert "problem: one: hidden_size is 16" in done.stdout


def test_a_model_that_is_no_fine_tune_of_the_base_is_named(tiny_family: Path, tmp_path: Path) -> None:
    """Of the same shape, so nothing but its weights tells."""
    other = tmp_path / "other"
    shutil.copytree(tiny_family / "base", other)
    tensors = load_file(other / "model.safetensors")
    mixed = {name: t.flatten()[torch.randperm(t.numel())].view(t.shape).contiguous() for name, t in tensors.items()}
    save_file(mixed, other / "model.safetensors", {"format": "pt"})
    done = run_cli("inspect", tiny_family / "base", tiny_family / "rev", other)
    assert done.returncode == 1, done.stderr
    assert "leave out other: it changes some weights by 1" in " ".join(done.stdout.split())
    sources = [{"name": "rev", "path": str(tiny_family / "rev")}, {"name": "other", "path": str(other)}]
    shown = run_cli("check", write_config(tmp_path, tiny_family, sources=sources), "--items", "2").stdout
    assert "warning: other is another model rather than a fine-tune of this base" in " ".join(shown.split())


def test_a_wrong_configuration_lists_all_its_problems(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, base="/no/such/base", space={"weigth": [0, 1]}, seed=-1)
    done = run_cli("search", config, "--run", tmp_path / "run")
    refuses(done, "space.weigth: not a coefficient of task_arithmetic", "seed", "base: no such folder")
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refuses(run_cli("search", tmp_path / "nothing.yaml"), "nothing.yaml: no such file")
    refuses(run_cli("merge", tmp_path / "nothing.yaml", "--out", tmp_path / "x"), "nothing.yaml")
    refuses(run_cli("resume", tmp_path), "not a run folder")
    refuses(run_cli("status", tmp_path / "x"), "not a run folder")


def test_a_truncated_model_is_named(tiny_family: Path, tmp_path: Path) -> None:
    family = tmp_path / "family"
    for name in ("base", "rev", "add"):
        shutil.copytree(tiny_family / name, family / name)
    weights = family / "add" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    done = run_cli("search", write_config(tmp_path, family), "--run", tmp_path / "run")
    refuses(done, "add/model.safetensors", "not a complete safetensors file")
    shutil.copy(tiny_family / "add" / "model.safetensors", weights)
    assert run_cli("search", tmp_path / "search.yaml", "--run", tmp_path / "run", "--trials", "2").returncode == 0


def test_mismatched_tokenizers_are_refused(tiny_family: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_family / "rev", tmp_path / "rev")
    tokenizer = json.loads((tmp_path / "rev" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "rev" / "tokenizer.json").write_text(json.dumps(tokenizer))
    sources = [{"name": "rev", "path": str(tmp_path / "rev")}, {"name": "add", "path": str(tiny_family / "add")}]
    done = run_cli("search", write_config(tmp_path, tiny_family, sources=sources), "--run", tmp_path / "run")
    refuses(done, "rev: another tokenizer", "2 tokens have other ids")


def test_an_unknown_task_file_and_metric_are_refused(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, tasks=[{"task": str(tmp_path / "no.yaml")}])
    refuses(run_cli("search", config, "--run", tmp_path / "run"), "tasks.0.task: no such file")
    task = str(ROOT / "evals" / "tiny" / "rev.yaml")
    config = write_config(tmp_path, tiny_family, tasks=[{"task": task, "metric": "bleu"}])
    refuses(run_cli("search", config, "--run", tmp_path / "run"), "bleu", "exact_match")


def test_a_time_of_day_and_a_duration_are_checked(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    refuses(run_cli("search", config, "--run", tmp_path / "a", "--timeout", "8 hours"), "is not a duration")
    refuses(run_cli("search", config, "--run", tmp_path / "b", "--until", "7 am"), "is not a time of day")


def test_a_search_stops_at_its_timeout(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"timeout": "1s"})
    assert run_cli("search", config, "--run", tmp_path / "run").returncode == 0
    assert 1 <= len(trials_of(tmp_path / "run")) < 200


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_one_message_and_the_run_goes_on_elsewhere(tiny_family: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=False).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    ballast = small / "ballast"
    try:
        ballast.write_bytes(bytes(24_700_000))
        config = write_config(tmp_path, tiny_family, budget={"trials": 60})
        first = run_cli("search", config, "--run", small / "run")
        refuses(first, "disk is full")
        ballast.unlink()
        finished = [t for t in trials_of(small / "run") if t[1] == "COMPLETE"]
        resumed = run_cli("resume", small / "run", "--trials", str(len(finished) + 2))
        assert resumed.returncode == 0, resumed.stderr
        assert trials_of(small / "run")[: len(finished)] == finished
        ballast.write_bytes(bytes(shutil.disk_usage(small).free - 1_000_000))
        refuses(run_cli("export", small / "run", "--out", small / "merged"), "disk is full")
        assert not (small / "merged").exists()
        assert run_cli("export", small / "run", "--out", tmp_path / "merged").returncode == 0
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("(sqlite3.OperationalError) attempt to write a readonly database", "read-only"),
        ("(sqlite3.OperationalError) disk I/O error", "cannot be read or written"),
        ("(sqlite3.FullError) database or disk is full", "disk is full"),
        ("[Errno 5] Input/output error: 'x'", "cannot be read or written"),
        ("a bug", None),
    ],
)
def test_a_disk_error_that_a_library_wraps_is_one_line(said: str, told: str | None) -> None:
    from evomerge.cli import disk_message

    try:
        try:
            raise OSError(said)
        except OSError as error:
            raise RuntimeError("a library's own") from error
    except RuntimeError as error:
        found = disk_message(error)
    assert (found is None) if told is None else (found is not None and told in found)


def test_every_command_has_an_example_in_its_help() -> None:
    for command in ("search", "resume", "status", "report", "export", "merge", "reproduce", "inspect", "evaluate"):
        done = run_cli(command, "--help")
        assert done.returncode == 0
        assert f"Example: evomerge {command}" in " ".join(done.stdout.split())


def test_a_winner_is_written_as_an_adapter_beside_what_that_loses(finished: Path, tmp_path: Path) -> None:
    done = run_cli("export", finished, "--out", tmp_path / "lora", "--lora", "8")
    assert done.returncode == 0, done.stderr
    assert "of the change's energy" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("tiny_rev on the selection"))
    assert re.search(r": exact_match \S+ as adapter, \S+ as model; gold_logprob -\S+ as adapter, ", line)
    assert f"- {line}" in (tmp_path / "lora" / "README.md").read_text()
    refuses(
        run_cli("export", finished, "--out", tmp_path / "none", "--lora", "none"),
        "--lora: give `exact` or a rank of 1 or more, not 'none'",
    )
