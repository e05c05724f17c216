"""The command that opens the playground."""

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import app


@app.command(epilog="Example: evomerge play runs/quickstart")
def play(
    run: Annotated[Path, typer.Argument(help="A run folder, or the configuration of a search.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page on this machine.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
) -> None:
    """Move coefficients by hand in a page of the browser: merge, ask and score at once, and save what is good."""
    from evomerge.play.serve import serve

    serve(run, port, browser)
