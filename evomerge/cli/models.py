"""Commands on models: merge, reproduce, inspect and score them, gather statistics."""

import json
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import (
    Chat,
    Device,
    DryRun,
    Fewshot,
    Lora,
    Mergekit,
    Multiturn,
    Out,
    Private,
    PushTo,
    TaskCode,
    app,
    json_alone,
    refuse_nothing,
)
from evomerge.printable import say


@app.command(epilog="Example: evomerge merge recipe.yaml --out merged/")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a configuration of mergekit (YAML).")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; it must be new or empty.")] = None,
    mergekit: Mergekit = None,
    lora: Lora = None,
    push: PushTo = None,
    private: Private = False,
    dry_run: DryRun = False,
    device: Device = "auto",
) -> None:
    """Merge models as a recipe says, and write the result as a model folder."""
    from evomerge.api.merge import merge as merge_models

    refuse_nothing(out, mergekit, push)
    merge_models(
        recipe, out=out, mergekit=mergekit, lora=lora, push=push, private=private, dry_run=dry_run, device=device
    )


@app.command(
    name="extract-lora", epilog="Example: evomerge extract-lora models/base models/math models/code --out adapters/"
)
def extract_lora(
    base: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    models: Annotated[list[str], typer.Argument(help="Fine-tunes of it, or NAME=PATH.")],
    out: Annotated[
        Path, typer.Option("--out", help="The folder to write; with several models, one folder in it for each.")
    ],
    rank: Annotated[int, typer.Option(min=1, help="The largest rank of a matrix.")] = 32,
    embed_lora: Annotated[
        bool, typer.Option("--embed-lora", help="Give embeddings and head a low rank too, instead of whole copies.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write fine-tuned models as LoRA adapters of their base, by truncated singular value decomposition."""
    from evomerge.api.lora import extract_lora as extract

    extract(base, models, out, rank, device, embed_lora)


@app.command(epilog="Example: evomerge reproduce merged/recipe.yaml --out again/ --check merged/")
def reproduce(
    recipe: Annotated[Path, typer.Argument(help="The recipe.yaml of an exported model.")],
    out: Out,
    check: Annotated[Path | None, typer.Option(help="The model folder to compare with, byte by byte.")] = None,
    device: Device = "auto",
) -> None:
    """Make an exported model again from the same inputs and compare every byte."""
    from evomerge.api.reproduce import reproduce as make_again

    found = make_again(recipe, out, check, device)
    for line in found.lines(out, check):
        say(line)
    if not found.is_same:
        raise typer.Exit(1)


@app.command(epilog="Example: evomerge inspect models/base models/math models/code --text lines.txt --html models.html")
def inspect(
    base: Annotated[
        str, typer.Argument(help="The base model, a folder or a hub id; or without sources a search configuration.")
    ],
    sources: Annotated[list[str] | None, typer.Argument(help="Fine-tunes or LoRA adapters of it.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A few lines that the models should be good at, to measure the loss between them."),
    ] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write tables and pictures as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Tell whether these models can be merged, and what to expect: distances, conflicts, losses between them, advice.

    A configuration also gives the text: gold answers of its search items.
    """
    from evomerge.report.inspection import inspect as inspect_models
    from evomerge.report.progress import console

    with json_alone(as_json):
        found = inspect_models(base, sources or (), text=text, device=device, show=not as_json)
    if as_json:
        say(found.to_json())
    else:
        console.print(found, soft_wrap=False)
    if page is not None:
        from evomerge.report.inspection_page import write_page

        write_page(page, found)
        if not as_json:
            say(f"wrote {page}")
    if not found.mergeable:
        raise typer.Exit(2)
    if found.strangers:
        raise typer.Exit(1)


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
    show: Annotated[int, typer.Option(min=0, help="Show prompt, answer, gold and scores of so many items a task.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write scores and answers of every item as JSON.")] = None,
) -> None:
    """Score one model with the search's own engine; the numbers are lm-eval's."""
    from evomerge.api.evaluate import evaluate as score
    from evomerge.files.write import write_text
    from evomerge.report.terminal import print_answers

    found = score(
        model,
        tasks,
        base=base,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        allow_task_code=allow_task_code,
        dtype=dtype,
        compute_dtype=compute_dtype,
        batch_tokens=batch_tokens,
        device=device,
    )
    print_answers(list(found.tasks.values()), show)
    if output is not None:
        write_text(output, json.dumps(found.as_dict(), indent=2, default=str) + "\n")


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
    from evomerge.api.evaluate import task_configs
    from evomerge.api.statistics import gather_statistics

    configs = task_configs(task, num_fewshot, apply_chat_template, fewshot_as_multiturn, allow_task_code)
    gather_statistics(kind, model, out, configs, base, items, search, device)
    say(f"wrote {out}")
