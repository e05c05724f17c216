"""The live view: what is shown while a search runs, when it has ended, and when its process was killed."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import termios
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from searches import finished_search, run_cli, start_cli, write_config

from evomerge.report.live_view import HEIGHT, WORKERS, columns, render, watch
from evomerge.search.monitor.snapshot import (
    POINTS,
    STATE,
    Coefficients,
    LastFailure,
    Snapshot,
    TaskScore,
    WorkerState,
    read_snapshot,
    thinned,
    why_ended,
    write_snapshot,
)

FULL = Snapshot(
    "small",
    "ties of 3 sources, cma-es",
    phase="searching",
    step=(3, 9),
    trials=40,
    limit=100,
    partial=7,
    failed=1,
    best=0.75,
    best_trial=31,
    points=((1, 0.25), (12, 0.5), (31, 0.75)),
    since_best=9,
    target=0.9,
    patience=20,
    per_minute=12.0,
    left=300.0,
    reserved=60.0,
    workers=(WorkerState("0", "cuda:0", "busy", 41, 3.0), WorkerState("1", "cuda:1", "restarting", None, 2.0, 1)),
    failures=(
        LastFailure(17, "OutOfMemoryError: [cuda] out of memory"),
        LastFailure(20, "a logit is not finite", True),
    ),
    used={"seconds": 200.0, "worker_seconds": 300.0, "device_seconds": 400.0, "forwards": 10, "tokens": 5000},
    price=(0.5, "EUR"),
)


def shown(snapshot: Snapshot, age: float = 0.0, ended: str | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(snapshot, age, ended))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_snapshot_is_read_back(tmp_path: Path) -> None:
    assert write_snapshot(tmp_path, FULL)
    assert read_snapshot(tmp_path) == FULL
    assert [p.name for p in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"name": "x"}', json.dumps({**asdict(FULL), "workers": [{"a": 1}]}), "[" * 10**5],
)
def test_a_damaged_snapshot_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_text(text)
    assert read_snapshot(tmp_path) is None


def test_a_snapshot_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    assert not write_snapshot(tmp_path / "gone", FULL)


def test_the_view_shows_all_there_is_to_know() -> None:
    text = shown(FULL)
    for words in (
        "small  ties of 3 sources", "searching (3 of 9 batches)", "40 of 100 trials, 7 stopped early, 1 failed",
        "12.0 trials per minute, about 5m left (60s of it for judging the finalists)",
        "best 0.7500 by trial 31, target 0.9, 9 trials since (ends at 20)",
        "worker 0  cuda:0  trial 41    since 3s", "worker 1  cuda:1  restarting  since 2s  1 restarts",
        "trial 17 failed: OutOfMemoryError: [cuda] out of memory", "trial 20 broken: a logit is not finite",
        "3m wall time, 7m device time (75% of it computing), 5.0k tokens", "0.50 EUR",
    ):  # fmt: skip
        assert words in text, words


def test_the_incumbent_is_shown_beside_the_best_parent_and_where_there_is_room_beside_the_plot() -> None:
    s = replace(
        FULL,
        tasks=(TaskScore("math", "acc", 0.612, 0.55, "wizard", 0.4), TaskScore("chat", "acc", 0.5)),
        coefficients=(
            Coefficients("weight", "wizard", 0.75, 0.5, 1.0),
            Coefficients("weight", "coder", 0.25, 0.25, 0.25),
            Coefficients("t", None, 0.5, 0.5, 0.5),
        ),
    )
    for width in (60, 80, 160):
        lines = shown(s, width=width).splitlines()
        assert max(map(len, lines)) <= width
        (row,) = [line.split() for line in lines if "math" in line]
        assert row[-5 - (width >= 70) :][-4:] == ["0.612", "0.550", "wizard", "0.400"]
        assert any("weight  wizard 0.75 (0.5 to 1), coder 0.25" in line for line in lines)
        assert any(line.strip().endswith("t  0.5") for line in lines)
        (head,) = [line for line in lines if "best parent" in line]
        assert ("█" in head) == (width == 160), "the first line of the plot"
    assert max(line.rindex("█") for line in shown(FULL, width=160).splitlines() if "█" in line) > 140


def test_a_phase_says_how_much_of_it_is_done() -> None:
    s = replace(FULL, phase="scoring base and parents", parts=(2, 5), unit="models", step=(3, 3))
    assert "scoring base and parents, 2 of 5 models done\n" in shown(s).replace(" \n", "\n")
    assert "searching (" not in shown(replace(FULL, step=(9, 9)))
    assert "left" not in shown(replace(FULL, left=None))


def test_times_go_on_between_two_snapshots() -> None:
    text = shown(FULL, age=120.0)
    assert "3m left" in text
    assert "since 2m" in text
    assert "no news for 2m" in text


def test_of_many_workers_the_first_are_listed_and_the_rest_is_counted() -> None:
    states = [WorkerState(str(n), "cuda", "busy" if n % 2 else "idle") for n in range(64)]
    text = shown(replace(FULL, workers=tuple(states)))
    assert f"worker {WORKERS - 1} " in text
    assert f"worker {WORKERS} " not in text
    assert "and 52 more" in text
    assert "26 busy, 26 idle" in text


rising = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=600, unique=True).map(
    lambda ys: list(enumerate(sorted(ys), 1))
)


@given(rising, st.integers(8, 80))
def test_the_plot_rises_from_its_first_to_its_best_score(points: list[tuple[int, float]], width: int) -> None:
    heights = columns(points, points[-1][0], width)
    assert len(heights) == width
    assert heights == sorted(heights)
    assert heights[-1] == (8 * HEIGHT if len(points) > 1 else 1)
    kept = thinned(points)
    assert len(kept) <= POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_the_plot_is_drawn_line_by_line() -> None:
    lines = [line for line in shown(FULL).splitlines() if "█" in line or "▁" in line]
    assert len(lines) == HEIGHT
    assert lines[0].strip().startswith("0.7500")
    assert lines[-1].strip().startswith("0.2500")
    assert lines[-1].count("█") > lines[0].count("█")


def test_who_no_longer_runs_is_told_apart(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    now = FULL.beat + 100
    assert why_ended(FULL, now) is None, "this very process lives"
    assert why_ended(replace(FULL, ended="finished"), now) == "finished"
    assert why_ended(replace(FULL, pid=child), now) == f"not running: its process {child} is gone"
    assert "no news from far" in str(why_ended(replace(FULL, host="far"), now))
    assert why_ended(replace(FULL, host="far"), FULL.beat + 5) is None


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_config(tmp_path_factory.mktemp("view"), tiny_family, budget={"trials": 6}))


def test_a_finished_run_is_shown_with_its_verdict(finished: Path) -> None:
    done = run_cli("status", finished, "--watch")
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert "6 of 6 trials" in done.stdout
    assert "holdout" in done.stdout


def test_a_run_of_which_nothing_is_known_is_not_waited_for(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    done = run_cli("status", tmp_path, "--watch")
    assert done.returncode == 0
    assert done.stdout.startswith("not running: the run folder has no state.json")


def test_a_run_is_watched_from_another_process_until_it_is_killed(tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = start_cli("search", write_config(tmp_path, tiny_family, budget={"trials": 5000}), "--run", run)
    seen: list[Snapshot] = []

    def look(seconds: float) -> None:
        """Between two pictures: wait for trials to be there, then kill the search."""
        if (snapshot := read_snapshot(run)) is not None:
            seen.append(snapshot)
            if snapshot.trials >= 3 and snapshot.phase == "searching":
                os.kill(search.pid, signal.SIGKILL)
                os.waitpid(search.pid, 0)
        time.sleep(0.05)

    console = Console(file=io.StringIO(), width=100)
    give_up = time.monotonic() + 300
    while read_snapshot(run) is None and time.monotonic() < give_up:
        time.sleep(0.05)
    assert watch(run, console, look) == f"not running: its process {search.pid} is gone"
    assert seen[-1].phase == "searching"
    assert seen[-1].workers[0].device == "cpu"
    assert len(seen[-1].points) >= 1
    assert {t.task for t in seen[-1].tasks} == {"tiny_rev", "tiny_add"}
    assert all(t.parent_name in ("rev", "add") and t.base is not None for t in seen[-1].tasks)
    assert [(c.knob, c.source) for c in seen[-1].coefficients] == [("weight", "rev"), ("weight", "add")]
    phases = list(dict.fromkeys(s.phase for s in seen))
    assert "scoring base and parents" in phases, phases
    assert all(s.parts[0] <= s.parts[1] for s in seen if s.parts)
    done = run_cli("status", run, "--watch")
    assert done.returncode == 0
    assert f"its process {search.pid} is gone" in done.stdout
    assert f"evomerge resume {run}" in done.stdout


def test_watching_ends_with_ctrl_c_and_no_word(tmp_path: Path, finished: Path) -> None:
    mine = json.loads((finished / STATE).read_text()) | {"ended": None, "pid": os.getpid()}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((finished / "config.yaml").read_text())
    (run / STATE).write_text(json.dumps(mine))
    prelude = (
        "import signal, os, time\n"
        "import evomerge.report.live_view as live\n"
        "live.watch.__defaults__ = (lambda s: os.kill(os.getpid(), signal.SIGINT),)\n"
    )
    done = run_cli("status", run, "--watch", prelude=prelude)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_search_in_a_terminal_draws_the_same_view(tiny_family: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    config = write_config(tmp_path, tiny_family, budget={"trials": 6})
    prelude = (
        "import os\nos.environ['TERM'] = 'xterm-256color'\n"
        "from evomerge.report.progress import console\nconsole.is_interactive = True\n"  # made without a terminal
    )
    search = start_cli("search", config, "--run", tmp_path / "run", prelude=prelude, terminal=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the child has closed its end
            break
        if not chunk:
            break
        said += chunk
    os.close(ours)
    done = search.wait()
    assert done.returncode == 0, done.stderr
    text = said.decode()
    for words in (
        "opening the models", "hashing the files", "task_arithmetic of 2 sources", "of 6 trials", "worker 0",
        "best parent", "wall time", "report:",
    ):  # fmt: skip
        assert words in text, words
    assert text.index("loading") < text.index("opening the models") < text.index("of 6 trials")
