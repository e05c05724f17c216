"""What several commands do: run a search under a person's eyes, write a model or a file for mergekit."""

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from evomerge.errors import EvomergeError


def run_search(run: Any, limits: Any, worker_options: Any, out: Path | None = None) -> None:
    """Search, show, report, and write the model to `out` if there is one.

    On an interrupt, say how to go on and leave with the signal's exit code.
    """
    from evomerge.report.html import write_report
    from evomerge.report.status import read_status
    from evomerge.report.terminal import SearchView, print_status
    from evomerge.search.interrupt import Interrupted, StopSignal
    from evomerge.search.loop import search as search_loop
    from evomerge.search.monitor.monitor import Monitor
    from evomerge.search.run import only_driver

    view, stop = SearchView(), StopSignal()
    with only_driver(run), stop.installed():
        try:
            with Monitor(run, run.config(), limits, view) as monitor:
                search_loop(run, monitor, stop, worker_options, out)
                monitor.phase("report")
                write_report(run)
        except Interrupted as interrupt:
            view.close()
            print(f"stopped by {interrupt}; nothing finished is lost. Go on with: evomerge resume {run.folder}")
            raise typer.Exit(128 + (stop.received or signal.SIGINT)) from None
        finally:
            view.close()
    print_status(read_status(run), timing=False)
    print(f"report: {run.report_file}")
    if out is None:
        print(f"export: evomerge export {run.folder} --out merged/")
    else:
        export_recommended(run, out, None)


def export_recommended(run: Any, out: Path | None, mergekit: Path | None) -> None:
    """Write what the verdict of a run recommends."""
    from evomerge.report.status import read_status
    from evomerge.report.usage_text import usage_section
    from evomerge.report.verdict_text import results_section
    from evomerge.search.verdict.recommended import recommended_recipe

    recipe, verdict = recommended_recipe(run)
    print(verdict["sentence"])
    results = results_section(verdict)
    with suppress(EvomergeError):  # the recipe is here, wherever the study may be
        results += usage_section(read_status(run))
    write_outputs(recipe, out, mergekit, results, run.config().device)


def write_outputs(recipe: Any, out: Path | None, mergekit: Path | None, results: str, device: str) -> None:
    """What was asked for: a model folder, a file for mergekit, or both."""
    from evomerge.files import write_text
    from evomerge.merge.mergekit.from_recipe import dump_mergekit

    if out is None and mergekit is None:
        raise EvomergeError("say what to write: --out FOLDER for the model, --mergekit FILE for a file of mergekit")
    if mergekit is not None:
        text, notes = dump_mergekit(recipe)
        write_text(mergekit, text)
        print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
        print(f"wrote {mergekit}")
    if out is not None:
        write_model(recipe, out, results, device)


def write_model(recipe: Any, out: Path, results: str, device: str) -> Any:
    """Merge a recipe into a new folder with a progress bar; the recipe with all its SHA-256 sums."""
    from evomerge.device import resolve_device, use
    from evomerge.merge.output.export import export as export_model
    from evomerge.merge.output.export import total_bytes
    from evomerge.merge.output.model_card import model_card
    from evomerge.merge.recipe.open_bank import open_bank
    from evomerge.merge.recipe.pinned_inputs import pin
    from evomerge.report.progress import Bar

    recipe = pin(recipe, {})
    # One merge reads every tensor once: nothing is worth holding.
    where = resolve_device(device)
    use(where)
    bank = open_bank(recipe, where, capacity=0, log=print)

    def say(note: str) -> None:
        print(f"note: {note}", file=sys.stderr)

    for note in bank.models.compatibility.notes:
        say(note)
    started = time.monotonic()
    bar = Bar("merging", total_bytes(recipe, bank), "MB")
    try:
        signed = export_model(recipe, bank, out, lambda r: model_card(r, results), bar.update, note=say)
    finally:
        bar.close()
    print(f"wrote {out} in {time.monotonic() - started:.1f} s")
    return signed
