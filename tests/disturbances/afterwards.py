"""What comes after a search: its model is written, and made again from its recipe."""

import shutil
import signal
import time
from pathlib import Path

from searches import Started, run_cli, start_cli

from disturbances.disturbed import Disturbed, injection, kill, plain, wait
from evomerge.files.read import sha256


def weights(folder: Path) -> dict[str, str]:
    return {f.name: sha256(f) for f in sorted(folder.glob("*.safetensors"))}


def killed_while_writing(search: Disturbed, start: list[str | Path], out: Path) -> str:
    """Kill a command that writes a model, until a random moment finds it at work, then let it end; what was done."""
    begun = time.monotonic()
    whole = wait(start_cli(*start, "--out", search.folder / "whole"))
    assert whole.returncode == 0, whole
    seconds = time.monotonic() - begun
    kills = 0
    for _ in range(3):
        started: Started = start_cli(*start, "--out", out)
        time.sleep(search.random.uniform(0, seconds))
        ended = kill(started)
        assert ended.returncode in (-signal.SIGKILL, 0), ended
        kills += ended.returncode != 0
        if out.exists():  # complete from the moment at which it has its name
            assert weights(out) == weights(search.folder / "whole"), "a part of a model has its name"
            shutil.rmtree(out)
    plain(wait(start_cli(*start, "--out", out)), 0)
    assert weights(out) == weights(search.folder / "whole")
    left = [f.name for f in out.parent.iterdir() if f.name.startswith(out.name + ".")]
    assert not left, f"unfinished folders are left: {left}"
    return f"{'killed, ' if kills else 'was done before, '}written again with the same bytes"


def done_search(search: Disturbed) -> None:
    done = run_cli(*search.command)
    assert done.returncode == 0, done


@injection("SIGKILL of an export")
def _(search: Disturbed) -> str:
    done_search(search)
    return killed_while_writing(search, ["export", search.run], search.folder / "merged")


@injection("SIGKILL of `reproduce`")
def _(search: Disturbed) -> str:
    done_search(search)
    plain(run_cli("export", search.run, "--out", search.folder / "merged"), 0)
    recipe = search.folder / "merged" / "recipe.yaml"
    what = killed_while_writing(
        search, ["reproduce", recipe, "--check", search.folder / "merged"], search.folder / "again"
    )
    assert weights(search.folder / "again") == weights(search.folder / "merged")
    return what
