"""What lies in folders of strangers, or in the way, is data: nothing else is read, written, deleted or waited for."""

import ast
import asyncio
import io
import json
import os
import re
import shutil
import stat
import sys
import time
import tracemalloc
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import optuna
import pyarrow as pa
import pytest
import yaml
from models import write_adapter, write_llama
from rich.text import Text
from searches import ROOT, finished_search, run_cli, write_config
from tokenizers import Tokenizer

from evomerge.config.config_file import load_config
from evomerge.config.database_url import has_password, masked, passwords
from evomerge.errors import EvomergeError
from evomerge.evaluate.chat_template import problem_of
from evomerge.evaluate.time_limit import TimeLimit, TooLong, try_tokenizer
from evomerge.files.new_folder import new_folder, remove_unfinished, rename_folder
from evomerge.files.read import TOKENIZER_BYTES, read_json
from evomerge.files.write import appending, write_text
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.report.item_table import COLUMNS, without_formulas
from evomerge.report.progress import Screen
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.monitor.snapshot import (
    Snapshot,
    read_snapshot,
    write_snapshot,
)
from evomerge.search.run import Run, open_run
from evomerge.search.storage.item_scores import pack, unpack
from evomerge.search.workers.local_worker import LocalWorker
from evomerge.search.workers.pool import Pool
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open_models import open_models, open_source
from evomerge.sources.tokenizer import drop_code, open_tokenizer

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # on a terminal
NAMES = ("[red]x[/]", "[/nothing]<b>&")
EVIL = "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\\r\u202e[/] "


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
        assert "cannot write there (not an ordinary file)" in done.stderr
    assert run_cli("status", run).returncode == 0


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


@pytest.mark.parametrize("kilobytes", [40, 120])
def test_a_limit_on_the_size_of_files_is_named(kilobytes: int, tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 3})
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10}))"
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert "ulimit -f" in done.stderr or "the disk cannot be read or written" in done.stderr
    assert "damaged" not in done.stderr
    assert run_cli("resume", tmp_path / "run").returncode == 0


@pytest.mark.parametrize("megabytes", [0, 8])
def test_a_limit_on_memory_is_named(megabytes: int, tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    now = "int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (({now}) + ({megabytes} << 20),) * 2)"
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert "error: this process gets no more memory" in done.stderr
    assert "ulimit -v" in done.stderr


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tracemalloc.start()
    try:
        assert read_json(tmp_path / "tokenizer.json", TOKENIZER_BYTES) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_worker_without_memory_says_so(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    small = tmp_path / "python"
    small.write_text(f'#!/bin/sh\nulimit -v 900000\nexec {sys.executable} "$@"\n')
    small.chmod(0o755)
    prelude = f"import sys; sys.executable = {str(small)!r}"
    done = run_cli("search", config, "--run", tmp_path / "run", "--workers", "2", prelude=prelude)
    assert done.returncode == 2, done.stderr
    assert "no worker could be started; the last one ended with exit code 1 (MemoryError" in done.stderr


def test_scores_that_unpack_to_gigabytes_are_refused() -> None:
    bomb = b64encode(zlib.compress(bytes(1 << 30), 9)).decode()
    assert len(bomb) < 2 << 20
    with pytest.raises(EvomergeError, match="no end within"):
        unpack(bomb)
    with pytest.raises(EvomergeError, match="cannot be read"):
        unpack(pack([1.0, 2.0])[:-6])
    assert unpack(pack([1.0, 2.0])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://us@er:hunter2@host/db",
        "postgresql://u?s:hunter2@host/db",
        "postgresql://u#s:hunter2@host/db",
        "mssql+pyodbc:///?odbc_connect=Driver%3DX%3BUID%3Dme%3BPWD%3Dhunter2%3BServer%3Dh",
        "mssql+pyodbc://me@host/db;password=hunter2",
        "mssql+pyodbc://host/db?x=1;pwd=hunter2;y=2",
    ],
)
def test_no_form_of_a_url_shows_its_password(url: str) -> None:
    assert "hunter2" not in masked(url)
    assert has_password(url)
    assert "hunter2" in passwords(url)


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


def test_all_that_is_printed_goes_through_one_function() -> None:
    """Rich is used as `Screen` alone, whose texts are no markup."""
    for file in (ROOT / "evomerge").rglob("*.py"):
        calls = {node.func.id for node in ast.walk(ast.parse(file.read_text())) if is_call(node)}
        alone = {"printable.py": {"print"}, "chat_template.py": {"print"}}.get(file.name, set())
        assert calls & {"print", "Console"} <= alone, file
    screen = io.StringIO()
    console = Screen(file=screen, force_terminal=True, width=60)
    console.print(Text(f"a{EVIL}b", "bold"), f"[red]{EVIL}[/]", f":smile:{EVIL}")
    plain = re.sub("\x1b\\[[01]m", "", screen.getvalue())
    assert "[red]" in plain
    assert ":smile:" in plain
    assert not ACTS.search(plain)


def is_call(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 3},
        {"left": "soon"},
        {"name": 1, "points": [[1]]},
        {"beat": {}},
        {"pid": 0},
        {"pid": -1},
        {"pid": None},
        {"beat": float("nan")},
        {"trials": 10**400},
        {"limit": -1},
        {"used": {"seconds": "long"}},
        {"price": [1]},
    ],
)
def test_a_state_of_another_shape_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    """`tests/test_fuzz.py` tries many more, and draws those that are read."""
    whole = asdict(Snapshot("n"))
    others: list[Any] = [whole | change, [], None, 3, {}, {k: v for k, v in whole.items() if k != "beat"}]
    for content in others:
        (tmp_path / "state.json").write_text(json.dumps(content))
        assert read_snapshot(tmp_path) is None
    for content in (whole | {"of a later version": 1}, {k: whole[k] for k in ("name", "pid", "host", "beat")}):
        (tmp_path / "state.json").write_text(json.dumps(content))
        assert read_snapshot(tmp_path) == Snapshot("n", beat=whole["beat"])


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


def test_whatever_ends_a_worker_s_start_ends_the_wait_for_it(tmp_path: Path) -> None:
    def fall(*arguments: object) -> Evaluator:
        raise Panic("in a library")

    async def open_pool() -> None:
        pool = Pool([LocalWorker(fall, "cpu", lambda: None)], print)
        try:
            await asyncio.wait_for(pool.open(), 20)
        finally:
            await pool.close()

    with pytest.raises(Panic, match="in a library"):
        asyncio.run(open_pool())


def test_a_tokenizer_whose_pattern_never_ends_is_an_error(tiny_family: Path, tmp_path: Path) -> None:
    family = Path(shutil.copytree(tiny_family, tmp_path / "family"))
    for file in family.glob("*/tokenizer.json"):
        content = json.loads(file.read_text())
        endless = {
            "type": "Split",
            "pattern": {"Regex": "(?:.|.|.|.|.|.)+(?!.|$)"},
            "behavior": "Isolated",
            "invert": False,
        }
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [endless, content["pre_tokenizer"]]}
        file.write_text(json.dumps(content))
    config = write_config(tmp_path, family, budget={"trials": 3})
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2, done.stderr[-500:]
    assert "no requests can be built of its items" in done.stderr
    assert "retry-limit" in done.stderr


def test_a_template_without_end_for_an_item_is_an_error(tiny_family: Path, tmp_path: Path) -> None:
    template = "{% if 'rev' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template + "{% endfor %}{% endfor %}{% endif %}")
    task = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "gold_logprob", "apply_chat_template": True}
    config = write_config(tmp_path, tiny_family, base=str(base), tasks=[task])
    limit = "import evomerge.evaluate.engine as engine; engine.ITEM_SECONDS = 2.0"
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert "the requests of an item take longer than 2 s; a loop in a template" in done.stderr


def test_work_in_python_ends_at_its_limit_and_not_after_it() -> None:
    def forever() -> None:
        with TimeLimit(0.1):
            while True:
                pass

    with pytest.raises(TooLong):
        forever()
    with TimeLimit(0.5) as limit:
        for _ in range(4):
            limit.again()
            until = time.thread_time() + 0.2
            while time.thread_time() < until:
                pass
    for _ in range(10**6):
        pass


def test_a_tokenizer_that_takes_long_is_refused_by_short_texts(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.evaluate.time_limit.TRIAL_SECONDS", 0.1)
    content = json.loads((tiny_family / "base" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pattern"]["Regex"] = "(?:a|a){19}b|."  # some hundredths of a second each
    tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(EvomergeError, match=r"s for a text of \d+ characters"):
        try_tokenizer(tokenizer.encode)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_model_s_links_to_other_files_are_not_copied(name: str, tiny_family: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "add", "path": str(tiny_family / "add"), "parameters": {"weight": 0.5}}
    recipe.write_text(yaml.safe_dump({"base": {"path": str(base)}, "sources": [source], "method": "task_arithmetic"}))
    done = run_cli("merge", recipe, "--out", tmp_path / "merged")
    assert done.returncode == 2, done.stderr
    assert f"{name}: is a symbolic link to {tmp_path / 'secret'}" in done.stderr
    assert not (tmp_path / "merged").exists()
    (base / name).unlink()
    (blobs := tmp_path / "blobs").mkdir()
    (blobs / "1f2e").write_text("{}")
    (base / name).symlink_to(blobs / "1f2e")  # as a hub's cache has it
    assert run_cli("merge", recipe, "--out", tmp_path / "merged").returncode == 0
    assert (tmp_path / "merged" / name).read_text() == "{}"
    assert not (tmp_path / "merged" / name).is_symlink()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "adapter_config.json"])
def test_a_stray_link_in_a_model_s_folder_is_refused_when_it_is_opened(name: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", base) if name.startswith("adapter") else write_llama(tmp_path / "it", 1)
    (tmp_path / "other").mkdir()
    secret = (folder / name).rename(tmp_path / "other" / "secret")
    (folder / name).symlink_to(secret)
    for act in (lambda: open_models(base, {"it": folder}), lambda: open_source(folder, open_checkpoint(base))):
        with pytest.raises(EvomergeError, match=f"{name}: is a symbolic link to {secret}, a file of another name"):
            act()
    for cached in (tmp_path / "other" / name, tmp_path / "other" / f"SHA256E-s9--{'0123456789abcdef' * 4}.bin"):
        secret = secret.rename(cached)
        (folder / name).unlink()
        (folder / name).symlink_to(cached)
        open_models(base, {"it": folder})
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # leads to itself
    with pytest.raises(EvomergeError):
        open_models(base, {"it": folder})


def test_mergekit_takes_no_chat_template_through_a_stray_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the user's own {")
    base = write_llama(tmp_path / "base")
    (base / "chat_template.jinja").symlink_to(tmp_path / "secret")
    content = {"merge_method": "linear", "models": [{"model": str(base), "parameters": {"weight": 1.0}}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(content | {"chat_template": "auto", "dtype": "float32"}))
    with pytest.raises(EvomergeError, match=f"jinja: is a symbolic link to {tmp_path / 'secret'}"):
        load_merge(tmp_path / "merge.yml")


def test_files_that_a_model_names_are_beside_it_or_are_not_opened(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", shards=2)
    os.mkfifo(pipe := tmp_path / "pipe")  # whoever opens it waits
    settings = json.loads((base / "tokenizer_config.json").read_text())
    for key in ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "chat_template_file"):
        settings[key] = str(pipe)
    settings |= {"fast_tokenizer_files": ["../pipe"], "name_or_path": str(pipe), "gguf_file": str(pipe)}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(open_tokenizer(base)) > 1
    (tmp_path / "mergekit_config.yml").write_text("merge_method: [")
    (base / "mergekit_config.yml").symlink_to(pipe)  # is never looked for
    (base / "recipe.yaml").symlink_to(pipe)
    open_models(base, {})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for name, reason in (
        ("../../x", "names a file outside its folder: ../../x"),
        (str(pipe), "names a file outside its folder"),
        ("a\0b", "missing file"),
        ("pipe", "not an ordinary file|missing file"),
    ):
        changed = {"weight_map": index["weight_map"] | {"x": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(EvomergeError, match=reason):
            open_checkpoint(base)
    many = {"weight_map": {str(k): f"{k}.safetensors" for k in range(10_001)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(many))
    with pytest.raises(EvomergeError, match="names 10,001 files"):
        open_checkpoint(base)


def test_the_base_that_an_adapter_names_is_compared_and_nothing_else(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    (far := tmp_path / "far").mkdir()
    (far / "config.json").write_text("{")
    os.mkfifo(tmp_path / "config.json")
    for declared in (str(far), str(tmp_path), "/proc/self/root", "../../../etc", "a\0b", "x" * 10**5, "\x1b[2J"):
        folder = write_adapter(tmp_path / "it", base, base_model_name_or_path=declared)
        models = open_models(base, {"it": folder})
        assert models.base.path == base
        assert isinstance(adapter := models.sources["it"], Adapter)
        assert adapter.base.path == base
        shutil.rmtree(folder)


def test_names_of_code_beside_a_model_are_not_copied(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "x": 1}))
    drop_code(settings)
    assert json.loads(settings.read_text()) == {"x": 1}


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


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 2 GB of memory"),
        ("{{ 'x' * 10 ** 7 }}", "makes a text of 10,000,000 characters"),
        ("{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}", None),
        ("{{ raise_exception('not like this') }}", None),
    ],
)
def test_a_chat_template_is_tried_within_bounds(
    template: str, problem: str | None, tiny_family: Path, tmp_path: Path
) -> None:
    assert problem_of(template, seconds=2) == problem
    if problem is None or "longer" in problem:
        return
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template)
    task = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "gold_logprob", "apply_chat_template": True}
    config = write_config(tmp_path, tiny_family, base=str(base), tasks=[task])
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"its chat template {problem}" in done.stderr


def test_no_cell_of_a_csv_is_a_formula() -> None:
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "\ta", "plain-1", None]
    empty = {"trial": None, "recipe": None, "split": "search", "metric": "m", "item": "i", "score": -0.5}
    table = without_formulas(pa.Table.from_pylist([{**empty, "task": n} for n in names], COLUMNS))
    assert table["task"].to_pylist() == ["'=HYPERLINK(1)", "'+1", "'-1", "'@x", "'\ta", "plain-1", None]
    assert table["score"].to_pylist() == [-0.5] * 7


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
