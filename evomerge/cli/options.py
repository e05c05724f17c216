"""The command line's root, and the options that several commands share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from evomerge import __version__
from evomerge.errors import EvomergeError
from evomerge.printable import say

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # the CPU computes what torch cannot on an Apple GPU

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Search for the best way to merge fine-tuned language models, and prove the result.",
)

Trials = Annotated[int | None, typer.Option(min=1, help="End after this many trials, the baselines included.")]
Timeout = Annotated[
    str | None, typer.Option(help="Have the result after this much time, every resume included: 8h, 90m, 1h30m.")
]
Workers = Annotated[
    str | None,
    typer.Option(help="How many workers: a count, or auto for one on each accelerator (default: 1, with --ray auto)."),
]
Ray = Annotated[str | None, typer.Option(help="Put the workers on a Ray cluster: its address, or local to start one.")]
Until = Annotated[str | None, typer.Option(help="Have the result at this local time: 07:00.")]
Target = Annotated[float | None, typer.Option(help="End when the best score is this high or higher.")]
Patience = Annotated[
    int | None, typer.Option(min=1, help="End when this many sampled trials in a row brought no better score.")
]
Simplify = Annotated[
    float | None,
    typer.Option(
        metavar="MARGIN",
        help="At the end drop sources and coefficients if that loses at most so much of the mean metric: 0.02.",
    ),
]
Fewshot = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, help="Examples in the prompt; by default as many as the task says."),
]
Chat = Annotated[
    bool, typer.Option("--apply-chat-template", help="Put the prompts into the tokenizer's chat template.")
]
Multiturn = Annotated[
    bool,
    typer.Option(
        "--fewshot-as-multiturn/--no-fewshot-as-multiturn", help="With a chat template: examples as turns of their own."
    ),
]
TaskCode = Annotated[bool, typer.Option("--allow-task-code", help="Let the task files run Python code of their own.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")]
ExportTo = Annotated[
    Path | None,
    typer.Option("--out", help="At the end write the recommended model into this folder; it must be new or empty."),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps, ...")]
Mergekit = Annotated[
    Path | None, typer.Option("--mergekit", help="The file to write the merge to as a mergekit configuration (YAML).")
]
Lora = Annotated[
    str | None,
    typer.Option(
        "--lora",
        metavar="exact|RANK",
        help="Write a LoRA adapter of the base instead: exact, if the sources are adapters that are added up; or the "
        "best one of at most this rank.",
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="OWNER/NAME",
        help="Upload the result to a new repository of the hub; --out is not needed then.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="With --push: only its owner sees the new repository.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="With --push: print the names and sizes of the files; the hub is not asked."),
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(f"evomerge {__version__}")
        raise typer.Exit


def refuse_nothing(out: Path | None, mergekit: Path | None, push: str | None) -> None:
    """EvomergeError if a command is to write neither a model nor a file for mergekit, nor to upload anything."""
    if out is None and mergekit is None and push is None:
        raise EvomergeError(
            "say what to write: --out FOLDER for the model, --mergekit FILE for a file of mergekit, --push OWNER/NAME "
            "to upload the model"
        )


@contextmanager
def json_alone(as_json: bool) -> Iterator[None]:
    """Within the context, what code of tasks prints goes to standard error if JSON is to be written.

    A program reads the JSON from standard output, where nothing else may stand.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield
