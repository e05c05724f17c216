"""The commands that search: start a search, resume one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from evomerge.cli.lost_terminal import terminal_may_go
from evomerge.cli.options import (
    ExportTo,
    Patience,
    Ray,
    RunFolder,
    Simplify,
    Target,
    Timeout,
    Trials,
    Until,
    Workers,
    app,
)
from evomerge.printable import say

if TYPE_CHECKING:
    from evomerge.api.run import Run
    from evomerge.api.search_in_run import SearchStopped


@app.command(epilog="Example: evomerge search configs/quickstart.yaml --trials 60")
@terminal_may_go()
def search(
    config: Annotated[Path, typer.Argument(help="A search configuration (YAML).")],
    trials: Trials = None,
    timeout: Timeout = None,
    until: Until = None,
    target: Target = None,
    patience: Patience = None,
    simplify: Simplify = None,
    workers: Workers = None,
    ray: Ray = None,
    run: Annotated[Path | None, typer.Option(help="The run folder (default: runs/NAME).")] = None,
    out: ExportTo = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="First look at the search, then go on.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look at the search: see evomerge check.")] = False,
) -> None:
    """Start a search: propose, merge, score, and judge the winner at the end."""
    from evomerge.api.search import search as start
    from evomerge.api.search_in_run import SearchStopped

    if dry_run:
        from evomerge.api.check import check as look

        look(config, trials=trials, timeout=timeout, until=until, workers=workers, ray=ray)
        return
    try:
        found = start(
            config,
            run=run,
            trials=trials,
            timeout=timeout,
            until=until,
            target=target,
            patience=patience,
            simplify=simplify,
            workers=workers,
            ray=ray,
            out=out,
            check=check,
        )
    except SearchStopped as stopped:
        leave(stopped)
    show_export(found, out)


@app.command(epilog="Example: evomerge resume runs/quickstart --trials 120")
@terminal_may_go()
def resume(
    run: RunFolder,
    trials: Trials = None,
    timeout: Timeout = None,
    until: Until = None,
    target: Target = None,
    patience: Patience = None,
    simplify: Simplify = None,
    workers: Workers = None,
    ray: Ray = None,
    out: ExportTo = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the configuration or a model changed.")
    ] = False,
    allow_task_code: Annotated[
        bool,
        typer.Option(
            "--allow-task-code", help="Agree to the Python code of tasks of a run that was started elsewhere."
        ),
    ] = False,
    on_finish: Annotated[
        bool,
        typer.Option("--on-finish", help="Agree to the on_finish of a run that was started elsewhere."),
    ] = False,
) -> None:
    """Go on with a search after Ctrl-C, a crash or a reboot; with a larger budget also after its end."""
    from evomerge.api.search import resume as go_on
    from evomerge.api.search_in_run import SearchStopped

    try:
        found = go_on(
            run,
            trials=trials,
            timeout=timeout,
            until=until,
            target=target,
            patience=patience,
            simplify=simplify,
            workers=workers,
            ray=ray,
            out=out,
            accept_changes=accept_changes,
            allow_task_code=allow_task_code,
            on_finish=on_finish,
        )
    except SearchStopped as stopped:
        leave(stopped)
    show_export(found, out)


def leave(stopped: "SearchStopped") -> NoReturn:
    """Say how to go on after a signal, and end with the signal's exit code."""
    say(f"stopped by {stopped.name}; nothing finished is lost. Go on with: evomerge resume {stopped.folder}")
    raise typer.Exit(128 + stopped.number)


def show_export(run: "Run", out: Path | None) -> None:
    """Name the command that follows from the verdict, and the one that writes the model, unless that is done."""
    from evomerge.report.verdict_text import next_command

    verdict = run.files.verdict()
    following = "" if verdict is None else next_command(verdict, run.folder)
    if following.startswith("evomerge resume"):
        say(f"next: {following}")
    if out is None:
        say(f"export: evomerge export {run.folder} --out merged/")
        if run.config.goals == "pareto":
            say("another model of the front: the same with --prefer TASK=0.7,TASK=0.3 or --knee")
