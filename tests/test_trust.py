"""What lies in folders of strangers, or in the way, is data: nothing else is read, written, deleted or waited for."""

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from badfiles import ACTS, EVIL
from searches import ROOT, finished_search, run_cli, write_config

from evomerge.config.config_file import load_config
from evomerge.errors import EvomergeError
from evomerge.files.new_folder import new_folder, remove_unfinished, rename_folder
from evomerge.files.write import appending, write_text
from evomerge.search.monitor.snapshot import (
    Snapshot,
    read_snapshot,
    write_snapshot,
)
from evomerge.search.run import Run, open_run

NAMES = ("[red]x[/]", "[/nothing]<b>&")


def odd_task(folder: Path, skill: str, name: str) -> dict[str, str]:
    """A task of the tiny family with such a name, whose prompts begin with what acts on a terminal."""
    content = yaml.safe_load((ROOT / "evals" / "tiny" / f"{skill}.yaml").read_text())
    file = folder / f"{skill}.yaml"
    file.write_text(yaml.safe_dump(content | {"task": name, "doc_to_text": EVIL + "{{prompt}}"}))
    shutil.copy(ROOT / "evals" / "tiny" / f"{skill}.jsonl", folder)
    return {"task": str(file), "objective": "gold_logprob"}


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run, with tasks of odd names and texts."""
    folder = tmp_path_factory.mktemp("finished")
    tasks = [odd_task(folder, skill, name) for skill, name in zip(("rev", "add"), NAMES, strict=True)]
    return finished_search(write_config(folder, tiny_family, tasks=tasks, budget={"trials": 3}))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("name", ["state.json.part", "report.html.part", "verdict.json.part", "config.yaml.part"])
def test_a_planted_link_is_replaced_not_followed(name: str, run: Path, tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("mine")
    (run / name).symlink_to(victim)
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["log.txt", "lock", "study.db", "cache", "cache/items/x", "workers"])
def test_a_link_that_would_be_written_through_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    path = run / name
    (victim := tmp_path / "victim").write_text("mine")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(victim)
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == 2, done.stderr
    assert f"{path}: is a symbolic link" in done.stderr
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["log.txt", "lock", "state.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert run_cli("status", run, "--watch").returncode == 0
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == (0 if name == "state.json" else 2), done.stderr
    if done.returncode == 2:
        assert "(not an ordinary file)" in done.stderr
    assert run_cli("status", run).returncode == 0


@pytest.mark.parametrize("name", ["study.db", "study.db-shm", "cache/items"])
def test_a_pipe_among_what_a_resume_reads_is_refused(name: str, run: Path) -> None:
    path = min(file for file in (run / name).glob("*")) if (run / name).is_dir() else run / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for command in ("resume", "status")[: 2 if name == "study.db" else 1]:
        done = run_cli(command, run, prelude="import signal; signal.alarm(120)")
        assert done.returncode == 2, done.stderr
        assert f"{path}: cannot be read" in done.stderr
        assert "(not an ordinary file)" in done.stderr


def test_a_study_that_was_deleted_is_not_begun_anew(run: Path) -> None:
    (run / "study.db").unlink()
    done = run_cli("resume", run)
    assert done.returncode == 2
    assert "there is no such file; put back a copy of it" in done.stderr
    assert not (run / "study.db").exists()
    for name in ("verdict.json", "state.json"):
        assert Run(run).has_begun()
        (run / name).unlink()
    assert Run(run).has_begun()  # by its log
    (run / "log.txt").unlink()
    assert not Run(run).has_begun()


@pytest.mark.parametrize("name", ["what?mode=memory", "a%20b", "a b#c", "x@y:z"])
def test_any_characters_may_stand_in_a_run_s_path(name: str, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / name))
    assert len(open_run(copy).study().trials) == 3
    other = Path(shutil.copytree(finished, tmp_path / name.split("?")[0].replace("%20", " ") / "x"))
    (other / "study.db").unlink()
    with pytest.raises(EvomergeError, match="no such file"):
        open_run(other).study()


def test_the_user_s_folders_beside_an_export_stay(tmp_path: Path) -> None:
    for name in ("merged.part", "merged.1.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with new_folder(tmp_path / "merged") as aside:
        (aside / "x").write_text("x")
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == ["x"]
    assert (tmp_path / "merged.part" / "mine").exists()
    assert (tmp_path / "merged.1.part" / "mine").exists()


def test_what_a_killed_export_left_is_removed_but_not_what_another_writes(tmp_path: Path) -> None:
    with new_folder(tmp_path / "merged") as aside:
        left = Path(shutil.copytree(aside, tmp_path / "merged.99999999.part"))
        with appending(left / ".unfinished"):
            pass
        remove_unfinished(left)
        remove_unfinished(aside)  # another process fills it
        assert not left.exists()
        assert aside.exists()
        (aside / "new").touch()
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "of another process").touch()
        with pytest.raises(EvomergeError, match="another process has written there"):
            rename_folder(aside, tmp_path / "merged")
        shutil.rmtree(tmp_path / "merged")


def test_an_export_into_the_working_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvomergeError, match="is the working folder"), new_folder(Path(".")):
        pass


def test_a_file_is_written_beside_a_link_with_its_temporary_name(tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("mine")
    (tmp_path / "a.txt.part").symlink_to(victim)
    write_text(tmp_path / "a.txt", "new")
    (tmp_path / "state.json.part").symlink_to(victim)
    assert write_snapshot(tmp_path, Snapshot("n"))
    assert (tmp_path / "a.txt").read_text() == "new"
    assert read_snapshot(tmp_path) is not None
    assert victim.read_text() == "mine"
    assert stat.S_ISREG((tmp_path / "state.json").lstat().st_mode)


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "", "a\n"])
def test_a_run_is_not_laid_out_in_another_folder_by_its_name(name: str, tiny_family: Path, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="name: "):
        load_config(write_config(tmp_path, tiny_family, name=name))
    assert load_config(write_config(tmp_path, tiny_family, name=".a..b")).name == ".a..b"


def test_a_folder_in_the_place_of_kept_items_is_not_waited_for(run: Path) -> None:
    kept = [file for file in (run / "cache" / "items").rglob("*") if file.is_file()]
    assert kept
    for file in kept:
        file.unlink()
        file.mkdir()
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == 2, done.stderr
    assert "not an ordinary file" in done.stderr or "Is a directory" in done.stderr


CLOSED = "import os; os.close(1); os.close(2)"
GONE = "import os; ends = os.pipe(); os.close(ends[0]); os.dup2(ends[1], 1); os.dup2(ends[1], 2)"
HANG_UP = "import os, signal, threading; threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGHUP)).start()"


@pytest.mark.parametrize("prelude", [CLOSED, GONE, HANG_UP])
def test_a_search_goes_on_without_its_terminal(prelude: str, tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 3})
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=prelude)
    assert done.returncode == 0
    assert (tmp_path / "run" / "verdict.json").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_names_and_texts_of_others_are_shown_as_they_are(finished: Path, tiny_family: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "[bold]run"))
    optuna.create_study(storage=f"sqlite:///{run / 'study.db'}", study_name=f"{NAMES[1]}{EVIL}")
    tasks = [part for skill in ("rev", "add") for part in ("--tasks", finished.parent / f"{skill}.yaml")]
    model = Path(shutil.copytree(tiny_family / "rev", tmp_path / "[red]rev[bold]"))
    commands: list[tuple[list[Any], Sequence[str]]] = [
        (["status", run, "--timing"], NAMES),
        (["status", run, "--watch"], NAMES),
        (["compare", run, finished], ("[bold]run", *NAMES)),
        (["studies", "--storage", run], ("[/n",)),
        (["items", run, "--out", tmp_path / "items.csv"], ()),
        (["report", run], ("[bold]run",)),
        (["check", finished.parent / "search.yaml", "--items", "4"], NAMES),
        (["evaluate", model, *tasks, "--limit", "4", "--show", "2"], NAMES),
        (["inspect", tiny_family / "base", model, "--html", tmp_path / "page.html"], ("[red]rev[bold]",)),
        (["evaluate", tmp_path / f"gone{EVIL}", *tasks], ("gone",)),
    ]
    for arguments, names in commands:
        done = run_cli(*arguments)
        assert done.returncode == (2 if names == ("gone",) else 0), done.stderr
        shown = done.stdout + done.stderr
        assert [name for name in names if name not in shown] == []
        assert not ACTS.search(shown), shown
    for file in (run / "log.txt", run / "report.html", tmp_path / "page.html"):
        assert not ACTS.search(file.read_text())
    assert "[/nothing]&lt;b&gt;&amp;" in (run / "report.html").read_text()
    assert "[/nothing]<b>" not in (run / "report.html").read_text()
    Run(run).log(f"note: {EVIL}")
    assert not ACTS.search((run / "log.txt").read_text())


def test_a_run_is_read_without_its_models_and_finds_them_where_the_file_says(tiny_family: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(tiny_family, tmp_path / "models"))
    config = write_config(tmp_path, models, budget={"trials": 3})
    run = finished_search(config)
    models.rename(tmp_path / "moved")
    for command in ("status", "report"):
        done = run_cli(command, run)
        assert done.returncode == 0, done.stderr
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == 2
    assert f"no such folder: {models / 'base'}" in done.stderr
    config.write_text(config.read_text().replace(str(models), str(tmp_path / "moved")))
    done = run_cli("resume", run, "--trials", "4")
    assert done.returncode == 0, done.stderr
    assert "the same models are elsewhere now" in (run / "log.txt").read_text()
    assert str(models) not in (run / "config.yaml").read_text()
    tokenizer = tmp_path / "moved" / "rev" / "config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    done = run_cli("resume", run, "--trials", "5")
    assert done.returncode == 2
    assert "rev: config.json is another file now" in done.stderr


def test_a_stranger_s_run_runs_no_code_of_tasks(tiny_family: Path, tmp_path: Path) -> None:
    place = f"lambda: pathlib.Path({str(tmp_path / 'agreed')!r})"
    home = f"import pathlib, evomerge.search.agreements as o; o.agreements = {place}"
    content = yaml.safe_load((ROOT / "evals" / "tiny" / "rev.yaml").read_text())
    content["dataset_kwargs"]["data_files"] = {
        k: str((ROOT / "evals" / "tiny" / v).resolve()) for k, v in content["dataset_kwargs"]["data_files"].items()
    }
    own = yaml.safe_dump(content) + "process_docs: !function code.same\n"
    (tmp_path / "own.yaml").write_text(own)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\ndef same(docs): return docs\n")
    task = {"task": str(tmp_path / "own.yaml"), "objective": "gold_logprob", "allow_task_code": True}
    config = write_config(tmp_path, tiny_family, tasks=[task], budget={"trials": 3})
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=home)
    assert done.returncode == 0, done.stderr
    assert run_cli("resume", tmp_path / "run", "--trials", "4", prelude=home).returncode == 0
    (tmp_path / "run").rename(tmp_path / "given")
    (tmp_path / "ran").unlink()
    commands: list[list[Any]] = [["resume", tmp_path / "given"], ["repeat", tmp_path / "given", "--trial", "0"]]
    for command in commands:
        done = run_cli(*command, prelude=home)
        assert done.returncode == 2
        assert "lets Python code of tasks run" in done.stderr
    assert run_cli("status", tmp_path / "given", prelude=home).returncode == 0
    assert not (tmp_path / "ran").exists()
    done = run_cli("resume", tmp_path / "given", "--allow-task-code", prelude=home)
    assert done.returncode == 0, done.stderr
    assert run_cli("resume", tmp_path / "given", prelude=home).returncode == 0
