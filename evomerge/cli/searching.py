"""Commands on a search: start it, resume it, show it, export what it found."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from evomerge.cli.lost_terminal import terminal_may_go
from evomerge.cli.options import (
    DryRun,
    ExportTo,
    Lora,
    Mergekit,
    Patience,
    Private,
    PushTo,
    Ray,
    RunFolder,
    Simplify,
    Target,
    Timeout,
    Trials,
    Until,
    Workers,
    app,
    refuse_nothing,
)
from evomerge.errors import EvomergeError
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


@app.command(epilog="Example: evomerge status runs/quickstart --timing")
def status(
    run: RunFolder,
    timing: Annotated[bool, typer.Option("--timing", help="Show where a trial's time goes.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the search as it goes on, until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show the best score so far (also by task), trials, rate, time left, and the verdict if there is one."""
    import json

    from evomerge.report.status import read_status
    from evomerge.report.terminal import print_status, watch_run
    from evomerge.report.verdict_text import next_command
    from evomerge.search.run import open_run

    if watch and as_json:
        raise EvomergeError("--json: not with --watch, which reads state.json in the run folder; so can you")
    opened = open_run(run)
    if watch:
        watch_run(opened)
    elif as_json:
        say(json.dumps(read_status(opened).as_dict(), indent=2))
    else:
        shown = read_status(opened)
        print_status(shown, timing)
        if shown.verdict is not None:
            say(f"next: {next_command(shown.verdict, opened.folder)}")


@app.command(epilog="Example: evomerge studies --storage 'postgresql+psycopg://me:${EVOMERGE_DB_PASSWORD}@db/studies'")
def studies(
    storage: Annotated[
        str,
        typer.Option(help="A database URL, in which ${NAME} is an environment variable; a study.db; or a run folder."),
    ],
) -> None:
    """List the studies in a database: trials, best score, who is working on them."""
    from evomerge.report.studies import print_studies

    print_studies(storage)


@app.command(epilog="Example: evomerge compare runs/seed0 runs/seed1 runs/seed2")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two run folders or more.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Put the verdicts of several runs side by side, and compare their candidates on the holdout items they share."""
    import json

    from evomerge.search.run import open_run
    from evomerge.search.verdict.across_runs import compare_runs

    found = compare_runs([open_run(run) for run in runs])
    if as_json:
        say(json.dumps(found.as_dict(), indent=2))
        return
    from evomerge.report.comparison import print_comparison

    print_comparison(found)


@app.command(epilog="Example: evomerge dashboard runs/quickstart")
def dashboard(
    run: RunFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port on 127.0.0.1; 0 for any that is free.")] = 8080,
) -> None:
    """Show the study in optuna-dashboard, on this machine only; a search may run meanwhile."""
    from evomerge.report.dashboard import serve
    from evomerge.search.run import open_run

    serve(open_run(run), port, lambda address: say(f"dashboard: {address}  (Ctrl-C ends it)"))


@app.command(epilog="Example: evomerge report runs/quickstart")
def report(
    run: RunFolder,
    landscape: Annotated[
        bool,
        typer.Option(
            "--landscape", help="First score models on the lines from the candidate to each parent and to the base."
        ),
    ] = False,
) -> None:
    """Write report.html again; of a search that has not ended, what there is so far."""
    from evomerge.report.page import write_report
    from evomerge.search.run import only_driver, open_run

    opened = open_run(run)
    if landscape:
        from evomerge.search.verdict.conflicts import write_conflicts
        from evomerge.search.verdict.landscape import measure_landscape

        with only_driver(opened):
            measure_landscape(opened)
            write_conflicts(opened, None)
    write_report(opened)
    say(str(opened.report_file))


@app.command(epilog="Example: evomerge items runs/quickstart --out items.parquet")
def items(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The table to write, .parquet or .csv; it must be new.")],
) -> None:
    """Write every item score of a run as a table: trial or recipe, split, task, metric, item, score."""
    from evomerge.report.item_table import write_items
    from evomerge.search.run import open_run

    say(f"wrote {write_items(open_run(run), out):,} scores to {out}")


@app.command(epilog="Example: evomerge export runs/quickstart --out merged/")
def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must be new or empty.")] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Export this trial instead of what is recommended.")] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS", help="Export the finalist that is best by these weights of tasks: math=0.7,chat=0.3."
        ),
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Export the finalist that gains most in the task in which it gains least.")
    ] = False,
    mergekit: Mergekit = None,
    lora: Lora = None,
    push: PushTo = None,
    private: Private = False,
    dry_run: DryRun = False,
) -> None:
    """Write what the verdict recommends as a Hugging Face model folder with its recipe."""
    from evomerge.api.run import open_run

    opened = open_run(run)
    refuse_nothing(out, mergekit, push)
    weights = None
    if prefer is not None:
        from evomerge.search.verdict.choices import parse_weights

        weights = parse_weights(prefer)
    opened.export(
        out,
        mergekit=mergekit,
        lora=lora,
        push=push,
        private=private,
        dry_run=dry_run,
        trial=trial,
        prefer=weights,
        knee=knee,
    )


@app.command(epilog="Example: evomerge repeat runs/quickstart --trial 17")
def repeat(
    run: RunFolder,
    trial: Annotated[int, typer.Option(min=0, help="The number of the trial.")],
) -> None:
    """Run one finished trial again, alone, and compare every item's score with the recorded one."""
    from evomerge.search.inputs import check_unchanged
    from evomerge.search.repeat import repeat as repeat_trial
    from evomerge.search.run import open_run

    opened = open_run(run)
    check_unchanged(opened, accept=False)
    found = repeat_trial(opened, trial)
    before, after = found.values
    same = found.differing == 0 and before == after
    say(f"trial {trial}: value {after!r}, recorded {before!r}; {found.differing} of {found.items} item scores differ")
    if not same:
        raise typer.Exit(1)
