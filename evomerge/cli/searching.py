"""Commands on a search: start it, go on with it, look at it, take home what it found."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from evomerge.actions import export_recommended, run_search, write_outputs
from evomerge.cli.options import (
    ExportTo,
    Mergekit,
    Patience,
    Ray,
    RunFolder,
    Target,
    Timeout,
    Trials,
    Until,
    Workers,
    app,
)
from evomerge.errors import EvomergeError


@app.command(epilog="Example: evomerge search configs/quickstart.yaml --trials 60")
def search(
    config: Annotated[Path, typer.Argument(help="A search configuration (YAML).")],
    trials: Trials = None,
    timeout: Timeout = None,
    until: Until = None,
    target: Target = None,
    patience: Patience = None,
    workers: Workers = None,
    ray: Ray = None,
    run: Annotated[Path | None, typer.Option(help="The run folder (default: runs/NAME).")] = None,
    out: ExportTo = None,
) -> None:
    """Start a search: propose, merge, score, and judge the winner at the end."""
    from evomerge.config.config_file import load_config, pin
    from evomerge.files import refuse_full
    from evomerge.search.budget.limits import limits_of, with_budget
    from evomerge.search.run import refuse_existing
    from evomerge.search.workers.worker_options import parse_worker_options

    loaded = with_budget(load_config(config), trials, timeout, target, patience)
    limits, worker_options = limits_of(loaded.budget, until), parse_worker_options(workers, ray)
    folder = run or Path("runs") / loaded.name
    refuse_existing(folder)
    if out is not None:
        refuse_full(out)
    # What the file alone shows is said before seconds go into imports, the rest before there is a run folder.
    from evomerge.merge.output.load_check import check_loads
    from evomerge.merge.recipe.layout import build_layout
    from evomerge.search.evaluation.task_set import check_statistics, open_task_set
    from evomerge.search.inputs import create_run
    from evomerge.search.models import open_config_models

    loaded = pin(loaded, {})
    models = open_config_models(loaded)
    for note in check_loads(build_layout(models), models.base):
        print(f"note: {note}", file=sys.stderr)
    task_set = open_task_set(loaded)
    check_statistics(loaded, models, task_set)
    created = create_run(loaded, task_set, config, folder)
    print(f"run folder: {folder}", flush=True)
    run_search(created, limits, worker_options, out)


@app.command(epilog="Example: evomerge resume runs/quickstart --trials 120")
def resume(
    run: RunFolder,
    trials: Trials = None,
    timeout: Timeout = None,
    until: Until = None,
    target: Target = None,
    patience: Patience = None,
    workers: Workers = None,
    ray: Ray = None,
    out: ExportTo = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the configuration or a model changed.")
    ] = False,
) -> None:
    """Go on with a search after Ctrl-C, a crash or a reboot; with a larger budget also after its end."""
    from evomerge.config.config_file import write_config
    from evomerge.files import refuse_full
    from evomerge.search.budget.limits import limits_of, with_budget
    from evomerge.search.inputs import check_unchanged
    from evomerge.search.run import open_run
    from evomerge.search.workers.worker_options import parse_worker_options

    worker_options = parse_worker_options(workers, ray)
    opened = open_run(run)
    if out is not None:
        refuse_full(out)
    config = check_unchanged(opened, accept_changes)
    changed = with_budget(config, trials, timeout, target, patience)
    limits = limits_of(changed.budget, until)
    if changed is not config:
        write_config(opened.config_file, changed)
    run_search(opened, limits, worker_options, out)


@app.command(epilog="Example: evomerge status runs/quickstart --timing")
def status(
    run: RunFolder,
    timing: Annotated[bool, typer.Option("--timing", help="Show where a trial's time goes.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the search as it goes on, until it ends.")] = False,
) -> None:
    """Show the best score so far, the trials, their rate, the time left, and the verdict if there is one."""
    from evomerge.report.status import read_status
    from evomerge.report.terminal import print_status, watch_run
    from evomerge.search.run import open_run

    opened = open_run(run)
    if watch:
        watch_run(opened)
    else:
        print_status(read_status(opened), timing)


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


@app.command(epilog="Example: evomerge report runs/quickstart")
def report(run: RunFolder) -> None:
    """Write report.html of a finished run again."""
    from evomerge.report.html import write_report
    from evomerge.search.run import open_run

    opened = open_run(run)
    if not opened.verdict_file.exists():
        raise EvomergeError(f"{run}: has no verdict yet; go on with `evomerge resume {run}`")
    write_report(opened)
    print(opened.report_file)


@app.command(epilog="Example: evomerge items runs/quickstart --out items.parquet")
def items(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The table to write, .parquet or .csv; it must be new.")],
) -> None:
    """Write every item score of a run as a table: trial or recipe, split, task, metric, item, score."""
    from evomerge.report.item_table import write_items
    from evomerge.search.run import open_run

    print(f"wrote {write_items(open_run(run), out):,} scores to {out}")


@app.command(epilog="Example: evomerge export runs/quickstart --out merged/")
def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must be new or empty.")] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Export this trial instead of what is recommended.")] = None,
    mergekit: Mergekit = None,
) -> None:
    """Write what the verdict recommends as a Hugging Face model folder with its recipe."""
    from evomerge.search.run import open_run
    from evomerge.search.verdict.recommended import recipe_of_trial

    opened = open_run(run)
    if trial is None:
        export_recommended(opened, out, mergekit)
        return
    recipe = recipe_of_trial(opened, trial)
    results = f"Trial {trial} of the search; not judged on the holdout.\n"
    write_outputs(recipe, out, mergekit, results, opened.config().device)


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
    print(f"trial {trial}: value {after!r}, recorded {before!r}; {found.differing} of {found.items} item scores differ")
    if not same:
        raise typer.Exit(1)
