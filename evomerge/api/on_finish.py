"""`on_finish`: a command and a webhook that are told when a search has ended, whatever they do about it.

What a run's configuration says is run only if the user has agreed to it on this machine (search/agreements.py): by
starting the search with it, or by `resume --on-finish`.
"""

import base64
import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from evomerge.config.database_url import expanded
from evomerge.config.running import OnFinishConfig
from evomerge.errors import EvomergeError
from evomerge.printable import say
from evomerge.search.agreements import agreed
from evomerge.search.run import Run
from evomerge.system import kill_process_group

COMMAND_SECONDS = 60.0  # after that the command is killed
WEBHOOK_SECONDS = 10.0  # of one attempt
ATTEMPTS = 2  # of the webhook
WAIT = 2.0  # seconds between them


@dataclass(frozen=True)
class Ending:
    """How a search ended.

    status: `finished` (there is a verdict), `failed` or `interrupted`.
    outcome: the verdict's outcome; without a verdict the status.
    sentence: the outcome in words.
    recommended: what the verdict recommends; empty without a verdict.
    """

    name: str
    run: str
    status: str
    outcome: str
    sentence: str
    recommended: str = ""

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that the command gets."""
        return {f"EVOMERGE_{key.upper()}": value for key, value in vars(self).items()}

    @property
    def body(self) -> dict[str, str]:
        """What the webhook gets as JSON; chat programs show `text`."""
        return {**vars(self), "text": f"{self.name}: {self.sentence}"}


def ending_of(run: Run, error: BaseException | None) -> Ending:
    """How a search ended.  error: what ended it; None if it has a verdict."""
    folder = str(run.folder.resolve())
    name = run.folder.name
    with contextlib.suppress(EvomergeError):
        name = run.config().name
    if error is None:
        with contextlib.suppress(EvomergeError):
            if (verdict := run.verdict()) is not None:
                return Ending(
                    name, folder, "finished", verdict["outcome"], verdict["sentence"], verdict.get("recommended", "")
                )
        return Ending(name, folder, "finished", "finished", "the search has ended")
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    lines = str(error).strip().splitlines()
    return Ending(name, folder, status, status, lines[0] if lines else type(error).__name__)


def content_of(config: OnFinishConfig) -> list[str | None]:
    """What the user agrees to."""
    return ["on_finish", config.command, config.webhook]


@contextlib.contextmanager
def telling_the_end(run: Run, show: bool) -> Iterator[None]:
    """Within the context a search runs; what its configuration says under `on_finish` is told how it ended.

    show: whether to print that nothing is told because the user has not agreed to it here.
    """
    on_finish = run.config().on_finish
    if on_finish is not None and not agreed(content_of(on_finish), run.folder):
        if show:
            say(
                f"note: on_finish of {run.config_file} is left out, as it was not agreed to on this machine; read it, "
                "and if it may run, resume with --on-finish",
                error=True,
            )
        on_finish = None
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ended = error
        raise
    finally:
        if on_finish is not None:
            tell(on_finish, ending_of(run, ended), run.log)


def tell(config: OnFinishConfig, ending: Ending, log: Callable[[str], None]) -> None:
    """Run the command and call the webhook; what goes wrong is one line of the log each.

    Neither the command nor the address is logged in full: they may contain passwords.
    """
    for what, work in ((config.command, run_command), (config.webhook, call_webhook)):
        if what is None:
            continue
        began = time.monotonic()
        try:
            found = work(what, ending)
        except Exception as error:  # whatever it is, the search has ended well or badly without it
            found = f"{'command' if work is run_command else 'webhook'} failed ({type(error).__name__})"
        with contextlib.suppress(EvomergeError):
            log(f"on_finish: {found} after {time.monotonic() - began:.1f} s")


def run_command(command: str, ending: Ending) -> str:
    """Run a command in the shell; what to log of it.  Its output goes nowhere; it and its children are killed in the
    end if it takes too long."""
    process = subprocess.Popen(
        command,
        shell=True,  # it is the user's own line
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ) | ending.variables,
        start_new_session=True,
    )
    try:
        code = process.wait(COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return "command killed, it did not end"
    finally:
        if process.returncode is None:
            kill_process_group(process.pid)
            process.wait()
    return f"command ended with exit code {code}"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the address that the user gave gets the message, or nobody."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def call_webhook(address: str, ending: Ending, environment: Mapping[str, str] = os.environ) -> str:
    """Send how the search ended as JSON; what to log of it."""
    parts = urlsplit(expanded(address, environment))
    host = parts.hostname or "?"
    headers = {"Content-Type": "application/json", "User-Agent": "evomerge"}
    login, _, place = parts.netloc.rpartition("@")
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(login).encode()).decode()}"
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=place)), json.dumps(ending.body).encode(), headers
    )
    opener = urllib.request.build_opener(NoRedirect)
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT)
        try:
            with opener.open(request, timeout=WEBHOOK_SECONDS) as answer:
                return f"webhook of {host} answered {answer.status}"
        except urllib.error.HTTPError as error:
            problem = f"answered {error.code}"
        except OSError as error:  # the address itself may be in its text
            problem = f"cannot be reached ({type(getattr(error, 'reason', error)).__name__})"
    return f"webhook of {host} {problem}, {ATTEMPTS} times"
