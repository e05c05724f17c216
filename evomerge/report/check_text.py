"""What `evomerge check` found, for the terminal."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.report.progress import seconds_text as whole_seconds
from evomerge.search.check.check import Check
from evomerge.search.check.concerns import GAINS
from evomerge.search.check.forecast import Forecast
from evomerge.search.check.memory import Memory
from evomerge.search.check.probe import ProbedTask

LONG = 600  # characters of a prompt that are shown, from both ends
ANSWER = 160  # of an answer


def check_text(check: Check, examples: bool = True) -> RenderableType:
    """Scores, the forecast and the concerns.  examples: first a prompt of each task with all answers."""
    parts: list[RenderableType] = []
    for task in check.probe.tasks if examples else []:
        parts += example(task)
    parts.append(score_table(check.probe.tasks))
    parts += [Text(line) for line in forecast_lines(check.forecast)]
    parts.append(Text(memory_line(check.memory)))
    if check.gain is not None:
        parts.append(Text(gain_line(check.gain)))
    for concern in check.concerns:
        parts += [Text(f"warning: {concern.what}", "yellow"), Text(f"         {concern.mend}")]
    count = len(check.concerns)
    parts.append(Text("nothing to warn of" if not count else f"{count} warning{'s' if count > 1 else ''}"))
    return Group(*parts)


def example(task: ProbedTask) -> Iterator[RenderableType]:
    """The first item of a task as the models saw it."""
    item = task.items[0]
    yield Text(f"{task.name}: {task.metric}, searched by {task.objective}", "bold")
    yield Text(shortened(item.prompt, LONG), "dim")
    table = Table.grid(padding=(0, 2))
    table.add_row("gold", Text(repr(item.gold)), "")
    for model, answer in item.answers.items():
        taken = "" if answer.taken == answer.text else f" -> {answer.taken!r}"
        table.add_row(model, Text(repr(shortened(answer.text, ANSWER)) + taken), f"{answer.metric:.3g}")
    yield table
    yield Text("")


def score_table(tasks: list[ProbedTask]) -> Table:
    """The mean metric of every model on the items."""
    table = Table(title=f"mean metric on {len(tasks[0].items)} items a task", title_justify="left")
    table.add_column("")
    for task in tasks:
        table.add_column(task.name, justify="right", overflow="fold")
    for model in tasks[0].models:
        table.add_row(model, *(f"{task.mean('metric', model):.3f}" for task in tasks))
    return table


def forecast_lines(plan: Forecast) -> Iterator[str]:
    """What the search will take."""
    parts = ", ".join(f"{task} {seconds_text(s)}" for task, s in plan.scoring.items())
    yield f"a trial takes about {seconds_text(plan.trial)}: merge {plan.merge:.1f}s, {parts}"
    learned = f", learned start {seconds_text(plan.steps)}" if plan.steps else ""
    yield f"base, sources and other baselines {seconds_text(plan.start)}{learned}, verdict {seconds_text(plan.end)}"
    if plan.candidates is not None:
        yield f"in {seconds_text(plan.limit or 0.0)} there is room for about {plan.candidates} candidates"
    if plan.whole < float("inf"):
        there = datetime.now() + timedelta(seconds=plan.whole)
        yield f"begun now, the result is there in about {seconds_text(plan.whole)}, at {there:%H:%M}"
    yield f"disk: {size_text(plan.disk)} for an exported model; {size_text(plan.disk_left)} are free here"


def memory_line(memory: Memory) -> str:
    """What the search needs of the memory."""
    live, files, free = map(size_text, (memory.live, memory.files, memory.free))
    return f"memory: about {live} for the model that is scored, {files} of model files beside it; {free} are free"


def gain_line(gain: float) -> str:
    """Which gains the holdout items can show."""
    seen = ", ".join(f"{100 * points:.0f}: {'yes' if gain <= points else 'no'}" for points in GAINS)
    return f"the holdout items can show a gain of {100 * gain:.1f} points or more ({seen})"


def size_text(size: int) -> str:
    """Bytes as text: 3 MB, 14.2 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def shortened(text: str, length: int) -> str:
    """A text without its middle if it is long."""
    return text if len(text) <= length else f"{text[: length // 2]} [...] {text[-length // 2 :]}"


def seconds_text(seconds: float) -> str:
    """A duration as text, short ones with a decimal."""
    return f"{seconds:.1f}s" if seconds < 10 else whole_seconds(seconds)
