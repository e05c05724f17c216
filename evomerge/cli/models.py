"""Commands on models: merge them, make them again, look at them, score them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.actions import write_model, write_outputs
from evomerge.cli.options import Chat, Device, Fewshot, Mergekit, Multiturn, Out, TaskCode, app
from evomerge.errors import EvomergeError

if TYPE_CHECKING:
    from evomerge.config.schema import TaskConfig


@app.command(epilog="Example: evomerge merge recipe.yaml --out merged/")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a configuration of mergekit (YAML).")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must be new or empty.")] = None,
    mergekit: Mergekit = None,
    device: Device = "auto",
) -> None:
    """Merge models as a recipe says, and write the result as a model folder."""
    from evomerge.merge.mergekit.load_merge import load_merge

    loaded, notes = load_merge(recipe)
    print("".join(f"note: {note}\n" for note in notes), end="", file=sys.stderr)
    write_outputs(loaded, out, mergekit, "", device)


@app.command(epilog="Example: evomerge reproduce merged/recipe.yaml --out again/ --check merged/")
def reproduce(
    recipe: Annotated[Path, typer.Argument(help="The recipe.yaml of an exported model.")],
    out: Out,
    check: Annotated[Path | None, typer.Option(help="The model folder to compare with, byte by byte.")] = None,
    device: Device = "auto",
) -> None:
    """Make an exported model again from the same inputs and compare every byte."""
    from evomerge.merge.output.compare import model_differences
    from evomerge.merge.recipe.pinned_inputs import check_fingerprints
    from evomerge.merge.recipe.recipe import load_recipe

    loaded = load_recipe(recipe)
    if check is not None and not (check / "config.json").is_file():
        raise EvomergeError(f"{check}: not a model folder (it has no config.json)")
    check_fingerprints(loaded)
    made = write_model(loaded, out, "", device)
    if found := [
        f"{n}: not the bytes that the recipe records" for n, d in loaded.outputs.items() if made.outputs.get(n) != d
    ]:
        print("\n".join(found))
    if check is not None:
        found += (lines := [f"{d.name}: {d.what}" for d in model_differences(check, out)])
        print("\n".join(lines) if lines else f"the bytes agree: {check} and {out}")
    elif loaded.outputs and not found:
        print("the bytes agree with the recipe's SHA-256 sums")
    if found:
        raise typer.Exit(1)


@app.command(epilog="Example: evomerge inspect models/base models/math models/code")
def inspect(
    base: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    sources: Annotated[list[str], typer.Argument(help="Fine-tunes or LoRA adapters of it.")],
) -> None:
    """Tell whether these models can be merged, and what to expect."""
    from evomerge.report.inspection import print_inspection
    from evomerge.sources.locate import locate
    from evomerge.sources.open_models import open_models

    names = {f"{Path(s).name}": locate(s) for s in sources}
    if len(names) < len(sources):
        raise EvomergeError("two of the sources have the same folder name; give each its own")
    models = open_models(locate(base), names, strict=False)
    if not print_inspection(models):
        raise typer.Exit(2)


def task_configs(names: list[str], fewshot: int | None, chat: bool, multiturn: bool, code: bool) -> list["TaskConfig"]:
    """The tasks that a command line names, with what it says of them, in a configuration's words."""
    from evomerge.config.schema import TaskConfig
    from evomerge.evaluate.tasks import task_files

    said = {"num_fewshot": fewshot, "apply_chat_template": chat, "fewshot_as_multiturn": multiturn}
    files = [file for name in names for file in task_files(name)]
    return [TaskConfig.model_validate({**said, "task": file, "allow_task_code": code}) for file in files]


@app.command(epilog="Example: evomerge evaluate merged/ --tasks evals/tiny/rev.yaml --tasks evals/tiny/sort.yaml")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model or a LoRA adapter: a folder or a hub id.")],
    tasks: Annotated[list[str], typer.Option("--tasks", help="A task file, a folder of them, or an lm-eval task.")],
    base: Annotated[str | None, typer.Option(help="The base model, if MODEL is an adapter.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first items of each task.")] = None,
    num_fewshot: Fewshot = None,
    apply_chat_template: Chat = False,
    fewshot_as_multiturn: Multiturn = True,
    allow_task_code: TaskCode = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    compute_dtype: Annotated[
        str, typer.Option(help="Type to compute in: auto, float32, or the same as --dtype.")
    ] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(min=64, help="Padded tokens per forward; by default what the device holds.")
    ] = None,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the scores, per item too, as JSON.")] = None,
) -> None:
    """Score one model with the search's own engine; the numbers are lm-eval's."""
    from typing import get_args

    from evomerge.device import TORCH_DTYPES, resolve_device, use
    from evomerge.evaluate.clock import Clock
    from evomerge.evaluate.standalone import evaluate_model
    from evomerge.evaluate.tasks import open_tasks
    from evomerge.files import write_text
    from evomerge.merge.live import open_live_model
    from evomerge.merge.recipe.recipe import Dtype
    from evomerge.report.progress import Steps
    from evomerge.report.terminal import print_results
    from evomerge.sources.locate import locate

    values = next((k for k in get_args(Dtype) if k == dtype), None)
    if values is None:
        raise EvomergeError(f"--dtype: {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    computing = next((k for k in ("auto", "float32", values) if k == compute_dtype), None)
    if computing is None:
        raise EvomergeError(f"--compute-dtype: {compute_dtype!r} is not one of auto, float32, {values}")
    where = resolve_device(device)
    use(where)
    opened = open_tasks(task_configs(tasks, num_fewshot, apply_chat_template, fewshot_as_multiturn, allow_task_code))
    live, tokenizer = open_live_model(locate(model), locate(base) if base else None, values, where, computing)
    computed = str(live.dtype).removeprefix("torch.")
    print(f"weights in {values}, computed in {computed}")
    clock, steps = Clock(device=where), Steps("scoring")
    try:
        results = evaluate_model(live, tokenizer, opened, batch_tokens or "auto", limit, clock, steps.step)
    finally:
        steps.close()
    print_results(results, clock)
    if output is not None:
        content = {
            r.task: {"items": r.items, "metrics": r.metrics, "compute_dtype": computed, "per_item": r.raw}
            for r in results
        }
        write_text(output, json.dumps(content, indent=2, default=str) + "\n")


@app.command(epilog="Example: evomerge statistics --kind fisher --model models/math --task math.yaml --out math.fisher")
def statistics(
    kind: Annotated[str, typer.Option(help="fisher or regmean: the merge method that will use them.")],
    model: Annotated[str, typer.Option(help="The source: a model or a LoRA adapter, a folder or a hub id.")],
    task: Annotated[
        list[str], typer.Option("--task", help="A task file or an lm-eval task that the source is good at.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write; it must be new.")],
    base: Annotated[str | None, typer.Option(help="The base model, if the source is an adapter.")] = None,
    items: Annotated[int, typer.Option(min=1, help="Use at most this many items of each task.")] = 256,
    search: Annotated[
        Path | None, typer.Option("--search", help="Take only items of this configuration's search split.")
    ] = None,
    num_fewshot: Fewshot = None,
    apply_chat_template: Chat = False,
    fewshot_as_multiturn: Multiturn = True,
    allow_task_code: TaskCode = False,
    device: Device = "auto",
) -> None:
    """Gather what `fisher` and `regmean` need to know of a source, on the gold answers of its own tasks."""
    from typing import get_args

    from evomerge.config.config_file import load_config
    from evomerge.device import resolve_device, use
    from evomerge.evaluate.tasks import open_tasks
    from evomerge.merge.live import open_live_model
    from evomerge.merge.methods.method import Statistics
    from evomerge.report.progress import Bar
    from evomerge.sources.locate import locate
    from evomerge.statistics.gather import choose_items, gather_statistics

    if (wanted := next((k for k in get_args(Statistics) if k == kind), None)) is None:
        raise EvomergeError(f"--kind: {kind!r} is not one of {', '.join(get_args(Statistics))}")
    if out.exists():
        raise EvomergeError(f"{out}: exists already; choose another name")
    opened = open_tasks(task_configs(task, num_fewshot, apply_chat_template, fewshot_as_multiturn, allow_task_code))
    chosen = choose_items(opened, items, load_config(search) if search else None)
    folder, below = locate(model), locate(base) if base else None
    where = resolve_device(device)
    use(where)
    live = open_live_model(folder, below, "float32", where)
    bar = Bar("gathering", sum(map(len, chosen.values())), "items")
    try:
        gather_statistics(wanted, folder, below, live, opened, chosen, out, bar.update)
    finally:
        bar.close()
    print(f"wrote {out}")
