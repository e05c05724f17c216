"""The first section: the verdict with its reason and the next command, or how far a running search is."""

import time
from html import escape

from evomerge.report.page.material import Material
from evomerge.report.page.parts import capital, copied, text
from evomerge.report.verdict_text import interval_text, next_command, remarks

KINDS = {"better": "good", "no difference shown": "even", "worse": "bad", "too little searched": "even"}


def verdict_section(material: Material) -> str:
    """The verdict, or how far the search is."""
    verdict = material.verdict
    if verdict is None:
        return so_far(material)
    headline, _, why = verdict["sentence"].partition(": ")
    score = interval_text(verdict["score"])
    command = next_command(verdict, material.run.folder)
    return (
        f"<section id=verdict class='verdict {KINDS[verdict['outcome']]}'><h2>{escape(headline)}</h2>"
        f"{text(capital(why), 'why')}"
        f"<p class=figure><b>{score.split(' ')[0]}</b> <span>{escape(score.partition(' ')[2])}</span> "
        f"mean score on {items(material, 'holdout')} holdout items that the search never saw</p>"
        f"{copied(command, meaning(command, verdict['recommended']))}"
        f"{''.join(text(line, 'dim') for line in remarks(verdict))}{text(summary(material), 'dim')}</section>"
    )


def meaning(command: str, recommended: str) -> str:
    """What the next command does."""
    if "resume" in command:
        return "Next: search on"
    return "Next: write the winner" if recommended == "winner" else f"Next: write what is recommended, {recommended}"


def items(material: Material, split: str) -> str:
    """How many items a split has, all tasks together."""
    assert material.verdict is not None, "items are counted in a verdict"
    return f"{sum(task['items'][split] for task in material.verdict['tasks'].values()):,}"


def so_far(material: Material) -> str:
    """How far a search is that has no verdict yet."""
    status = material.status
    best = ""
    if status.best is not None:
        name = status.baselines.get(status.best.number)
        also = f", {name}" if name else ""
        best = (
            f"<p class=figure><b>{status.best.value or 0.0:.3f}</b> best {escape(material.value_title)}, "
            f"by trial {status.best.number}{escape(also)}</p>"
        )
    planned = f" of {status.config.budget.most}" if status.config.budget.most else ""
    return (
        "<section id=verdict class='verdict even'><h2>So far</h2>"
        f"{text(f'{status.finished}{planned} trials have finished; there is no verdict yet.', 'why')}{best}"
        f"{copied(f'evomerge resume {material.run.folder}', 'If the search does not run any more: go on')}"
        f"{text(summary(material), 'dim')}{text('Written ' + time.strftime('%Y-%m-%d %H:%M'), 'dim')}</section>"
    )


def summary(material: Material) -> str:
    """Method, sampler, seed, trials, types and the choice of the method in one line."""
    status, config = material.status, material.status.config
    sources = f"{config.method} of {len(config.sources)} sources"
    types = f"; weights in {config.dtype}, computed in {status.compute_dtype}" if status.compute_dtype else ""
    searched = f"{config.sampler.name}, seed {config.seed}; {status.finished} trials{status.endings}"
    choice = f". Method: {status.choice.sentence}" if status.choice else ""
    return f"{sources}; {searched}{types}{choice}"
