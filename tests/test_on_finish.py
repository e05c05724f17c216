"""`on_finish`: who is told of the end of a search, and that nothing it does changes how the search ended."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from searches import run_cli, start_cli, write_config

from evomerge.api import on_finish
from evomerge.api.on_finish import Ending, tell
from evomerge.config.running import OnFinishConfig

ENDING = Ending("small", "/runs/small", "finished", "better", "Winner: 'quoted' $HOME; done", "winner")


class Hook(ThreadingHTTPServer):
    """A webhook on 127.0.0.1.  answers: the status of each answer, the last one for all that follow; 0: none comes."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.logins: list[str | None] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/secret-path?token=secret-query"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.logins.append(self.headers.get("Authorization"))
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answers = self.server.answers
        status = answers.pop(0) if len(answers) > 1 else answers[0]
        if not status:
            time.sleep(3)
        self.send_response(status or 200)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(on_finish, "WAIT", 0.01)
    made: list[Hook] = []

    def make(*answers: int) -> Hook:
        made.append(Hook(list(answers)))
        return made[-1]

    yield make
    for hook in made:
        hook.shutdown()


def told(command: str | None = None, webhook: str | None = None) -> list[str]:
    lines: list[str] = []
    tell(OnFinishConfig(command=command, webhook=webhook), ENDING, lines.append)
    return lines


def own_agreements(folder: Path) -> str:
    """A prelude of `run_cli` after which agreements are kept in a folder of the test."""
    where = str(folder / "agreed")
    return f"import evomerge.search.agreements as o\nfrom pathlib import Path\no.agreements = lambda: Path({where!r})\n"


def test_a_command_gets_the_end_in_its_environment(tmp_path: Path) -> None:
    file = tmp_path / "told.txt"
    lines = told(f'printf "%s|" "$EVOMERGE_STATUS" "$EVOMERGE_OUTCOME" "$EVOMERGE_SENTENCE" "$EVOMERGE_RUN" > {file}')
    assert file.read_text() == f"finished|better|{ENDING.sentence}|/runs/small|"
    assert len(lines) == 1
    assert lines[0].startswith("on_finish: command ended with exit code 0 after")


def test_a_command_that_fails_or_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exit code 3" in told("exit 3")[0]
    assert "exit code 127" in told("no-such-program --password secret-word")[0]
    assert "secret-word" not in told("no-such-program --password secret-word")[0]
    monkeypatch.setattr(on_finish, "COMMAND_SECONDS", 0.3)
    began = time.monotonic()
    assert "killed" in told("sleep 1717 & sleep 1717")[0]
    assert time.monotonic() - began < 10
    time.sleep(0.1)
    assert "sleep 1717" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_webhook_gets_the_end_as_json(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = hooks(200)
    (line,) = told(webhook=hook.address)
    assert hook.bodies == [{**vars(ENDING), "text": f"small: {ENDING.sentence}"}]
    assert "webhook of 127.0.0.1 answered 200" in line
    monkeypatch.setenv("EVOMERGE_TEST_PORT", str(hook.server_address[1]))
    told(webhook="http://127.0.0.1:${EVOMERGE_TEST_PORT}/")
    assert len(hook.bodies) == 2
    told(webhook=f"http://me:secret@127.0.0.1:{hook.server_address[1]}/")
    assert hook.logins[-2:] == [None, "Basic bWU6c2VjcmV0"]
    (line,) = told(webhook="http://127.0.0.1:80/${EVOMERGE_TEST_UNSET}")
    assert "webhook failed" in line


def test_a_webhook_that_fails_is_asked_once_more_and_its_secrets_are_in_no_line(
    hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = hooks(503, 204)
    assert "answered 204" in told(webhook=again.address)[0]
    assert len(again.bodies) == 2
    monkeypatch.setattr(on_finish, "WEBHOOK_SECONDS", 0.3)
    for answer, words in ((500, "answered 500, 2 times"), (302, "answered 302, 2 times"), (0, "cannot be reached")):
        hook = hooks(answer)
        (line,) = told(webhook=hook.address)
        assert words in line
        assert "secret" not in line
    (line,) = told(webhook="http://user:secret@127.0.0.1:1/secret")
    assert "127.0.0.1 cannot be reached (ConnectionRefusedError), 2 times" in line


@pytest.mark.parametrize("given", [{}, {"webhook": "ftp://host/x"}, {"webhook": "file:///etc/passwd"}, {"command": ""}])
def test_what_cannot_be_meant_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        OnFinishConfig(**given)


def test_an_end_without_a_verdict_has_its_status_as_outcome() -> None:
    assert replace(ENDING, status="failed", outcome="failed").variables["EVOMERGE_OUTCOME"] == "failed"


def test_a_search_tells_its_end_and_a_strangers_command_waits_for_the_users_word(
    tiny_family: Path, tmp_path: Path, hooks: Any
) -> None:
    hook, file = hooks(200), tmp_path / "told.txt"
    home = own_agreements(tmp_path)
    command = f'echo "$EVOMERGE_STATUS" "$EVOMERGE_OUTCOME" >> {file}; exit 9'
    config = write_config(
        tmp_path, tiny_family, budget={"trials": 8}, on_finish={"command": command, "webhook": hook.address}
    )
    run = tmp_path / "run"
    done = run_cli("search", config, "--run", run, prelude=home)
    assert done.returncode == 0, done.stderr
    outcome = json.loads((run / "verdict.json").read_text())["outcome"]
    assert file.read_text() == f"finished {outcome}\n"
    assert hook.bodies[0]["outcome"] == outcome
    assert hook.bodies[0]["run"] == str(run)
    log = (run / "log.txt").read_text()
    assert "on_finish: command ended with exit code 9" in log
    assert "secret" not in log
    assert (run / "config.yaml").stat().st_mode & 0o077 == 0, "the address may have a password"

    stranger = tmp_path / "stranger"
    shutil.copytree(run, stranger)
    done = run_cli("resume", stranger, "--trials", "9", prelude=home)
    assert done.returncode == 0, done.stderr
    assert "on_finish" in done.stderr
    assert "--on-finish" in done.stderr
    assert len(hook.bodies) == len(file.read_text().splitlines()) == 1
    done = run_cli("resume", stranger, "--trials", "10", "--on-finish", prelude=home)
    assert done.returncode == 0, done.stderr
    assert len(hook.bodies) == len(file.read_text().splitlines()) == 2
    done = run_cli("resume", run, "--trials", "9", prelude=home)
    assert len(hook.bodies) == 3, "where the search was started, its user has agreed"


def test_an_interrupted_search_tells_it_too_and_keeps_its_exit_code(tiny_family: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "told.txt", tmp_path / "run"
    home = own_agreements(tmp_path)
    on_end = {"command": f'echo "$EVOMERGE_STATUS" > {file}'}
    config = write_config(tmp_path, tiny_family, budget={"trials": 5000}, on_finish=on_end)
    search = start_cli("search", config, "--run", run, prelude=home)
    give_up = time.monotonic() + 300
    while time.monotonic() < give_up and not ((run / "log.txt").exists() and "begins" in (run / "log.txt").read_text()):
        time.sleep(0.05)
    os.kill(search.pid, signal.SIGTERM)
    assert search.wait().returncode == 128 + signal.SIGTERM
    assert file.read_text() == "interrupted\n"
