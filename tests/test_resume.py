"""A search that was killed goes on as if nobody had killed it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from searches import BETWEEN_RESULT_AND_END, KILL, ROOT, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.files import new_folder as folders

# Each prelude kills the process at one exact moment of its work.
DURING_A_MERGE = (
    KILL
    + """
import evomerge.merge.materialise as m
calls, real = [0], m.materialise_tensor
def counted(recipe, bank, name, out):
    calls[0] += 1
    if calls[0] == 9 * 38 + 17:
        die()
    return real(recipe, bank, name, out)
m.materialise_tensor = counted
"""
)
DURING_AN_EVALUATION = (
    KILL
    + """
import evomerge.evaluate.engine as s
calls, real = [0], s.Engine.score_parts
def counted(*a):
    calls[0] += 1
    if calls[0] == 22:  # after some of the trials
        die()
    return real(*a)
s.Engine.score_parts = counted
"""
)
BEFORE_THE_PARAMETERS_ARE_STORED = (
    KILL
    + """
import evomerge.search.storage.sql_statements as t
calls, real = [0], t.describe_trial
def counted(*a):
    calls[0] += 1
    if calls[0] == 12:
        die()
    real(*a)
t.describe_trial = counted
"""
)
DURING_THE_HOLDOUT = (
    KILL
    + """
import evomerge.search.evaluation.stored_evaluations as l
real = l.Evaluations.score
def counted(self, split, *a, **k):
    if split == "holdout":
        die()
    return real(self, split, *a, **k)
l.Evaluations.score = counted
"""
)
BEFORE_THE_SCALE_IS_STORED = (
    KILL
    + """
import evomerge.search.evaluation.stored_evaluations as l
l.Evaluations.keep_scale = lambda self, scale: die()
"""
)
DURING_THE_EXPORT = (
    KILL
    + """
import evomerge.merge.output.export as e
calls, real = [0], e.materialise_tensor
def counted(*a):
    calls[0] += 1
    if calls[0] == 20:
        die()
    return real(*a)
e.materialise_tensor = counted
"""
)


@pytest.fixture(scope="module")
def undisturbed(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    return finished_search(write_config(tmp_path_factory.mktemp("undisturbed"), tiny_family))


@pytest.mark.parametrize(
    "prelude",
    [
        pytest.param(DURING_A_MERGE, id="merge", marks=pytest.mark.more),
        pytest.param(DURING_AN_EVALUATION, id="evaluation"),
        pytest.param(BEFORE_THE_PARAMETERS_ARE_STORED, id="parameters", marks=pytest.mark.more),
        pytest.param(BETWEEN_RESULT_AND_END, id="result"),
        pytest.param(DURING_THE_HOLDOUT, id="holdout"),
        pytest.param(BEFORE_THE_SCALE_IS_STORED, id="scale", marks=pytest.mark.more),
    ],
)
def test_a_killed_search_resumes_to_the_same_trials_and_winner(
    prelude: str, undisturbed: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed = run_cli("search", write_config(tmp_path, tiny_family), "--run", run, prelude=prelude)
    assert killed.returncode == -signal.SIGKILL
    finished_before = [t for t in trials_of(run) if t[1] == "COMPLETE"]
    resumed = run_cli("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    after = trials_of(run)
    assert after[: len(finished_before)] == finished_before
    assert after == trials_of(undisturbed)
    assert verdict_of(run) == verdict_of(undisturbed)


def test_a_killed_export_leaves_no_folder_and_can_be_repeated(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    killed = run_cli("export", undisturbed, "--out", out, prelude=DURING_THE_EXPORT)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert run_cli("export", undisturbed, "--out", out).returncode == 0
    again = run_cli("reproduce", out / "recipe.yaml", "--out", tmp_path / "again", "--check", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the bytes agree" in again.stdout


@pytest.mark.parametrize("moment", ["sync", "rename_folder", "unlink"])
def test_what_is_left_of_a_process_that_died_at_the_end_of_its_writing_is_removed(moment: str, tmp_path: Path) -> None:
    """Before, the folder was no longer marked as unfinished then, so a whole model stayed under a temporary name."""
    if (child := os.fork()) == 0:
        with folders.new_folder(tmp_path / "merged") as aside:
            (aside / "x").write_text("x")
            setattr(Path if moment == "unlink" else folders, moment, lambda *_: os._exit(9))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    with folders.new_folder(tmp_path / "merged") as aside:
        (aside / "x").write_text("x")
    assert [f.relative_to(tmp_path).as_posix() for f in sorted(tmp_path.rglob("*"))] == ["merged", "merged/x"]


def test_a_larger_budget_goes_on_where_the_search_ended(undisturbed: Path, tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family)
    assert run_cli("search", config, "--run", run, "--trials", "6").returncode == 0
    assert run_cli("resume", run, "--trials", "16").returncode == 0
    assert trials_of(run) == trials_of(undisturbed)


def test_an_interrupted_search_gives_its_trial_back(undisturbed: Path, tiny_family: Path, tmp_path: Path) -> None:
    prelude = DURING_A_MERGE.replace("SIGKILL", "SIGINT")  # which is looked for after every tensor
    run = tmp_path / "run"
    stopped = run_cli("search", write_config(tmp_path, tiny_family), "--run", run, prelude=prelude)
    assert stopped.returncode == 128 + signal.SIGINT, stopped.stderr
    assert "evomerge resume" in stopped.stdout
    assert [t[1] for t in trials_of(run)].count("RUNNING") == 1
    assert run_cli("resume", run).returncode == 0
    assert trials_of(run) == trials_of(undisturbed)


def test_a_changed_data_file_is_refused_until_it_is_accepted(tiny_family: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "evals" / "tiny" / "rev.yaml").read_text())
    (source,) = task["dataset_kwargs"]["data_files"].values()
    lines = (ROOT / "evals" / "tiny" / source).read_text().splitlines()
    task["dataset_kwargs"]["data_files"] = dict.fromkeys(task["dataset_kwargs"]["data_files"], "items.jsonl")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "items.jsonl").write_text("\n".join(lines[:80]) + "\n")
    run = tmp_path / "run"
    tasks = [{"task": str(tmp_path / "task.yaml"), "objective": "gold_logprob"}]
    config = write_config(tmp_path, tiny_family, tasks=tasks, budget={"trials": 4})
    assert run_cli("search", config, "--run", run).returncode == 0
    (tmp_path / "items.jsonl").write_text("\n".join(lines[1:90]) + "\n")
    refused = run_cli("resume", run)
    assert refused.returncode == 2
    assert "items are others now" in refused.stderr
    assert run_cli("resume", run, "--accept-changes").returncode == 0


def test_a_changed_configuration_is_refused_until_it_is_accepted(tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, budget={"trials": 4})
    assert run_cli("search", config, "--run", run).returncode == 0
    write_config(tmp_path, tiny_family, budget={"trials": 4}, seed=4)
    refused = run_cli("resume", run)
    assert refused.returncode == 2
    assert "seed: 3 -> 4" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run_cli("resume", run, "--accept-changes", "--trials", "5").returncode == 0


def test_a_second_driver_is_refused(undisturbed: Path) -> None:
    import fcntl

    with (undisturbed / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = run_cli("resume", undisturbed)
    assert second.returncode == 2
    assert "another evomerge process" in second.stderr


def test_a_study_in_a_shared_database_is_gone_on_with_from_another_folder_if_it_is_the_same(
    undisturbed: Path, tiny_family: Path, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    first = run_cli(
        "search", write_config(tmp_path, tiny_family, storage=storage), "--run", tmp_path / "a", "--trials", "6"
    )
    assert first.returncode == 0, first.stderr
    other = run_cli("search", write_config(tmp_path, tiny_family, storage=storage, seed=4), "--run", tmp_path / "b")
    assert other.returncode == 2
    assert "a study 'small' of other models, items or settings" in other.stderr
    same = run_cli("search", write_config(tmp_path, tiny_family, storage=storage), "--run", tmp_path / "c")
    assert same.returncode == 0, same.stderr
    assert trials_of(tmp_path / "c") == trials_of(undisturbed)
