"""Commands on a run: show it, compare it, export what it found, repeat a trial."""

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import DryRun, Lora, Mergekit, Private, PushTo, RunFolder, app, refuse_nothing
from evomerge.errors import EvomergeError
from evomerge.printable import say


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
