"""The scores on the holdout split: every model by task, its intervals as bars."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from evomerge.report.page.material import Material
from evomerge.report.page.parts import chip, folded, section, span_mark, table, text
from evomerge.report.verdict_text import GAIN, GAIN_MEANS, candidate_title, difference_text

SPLITS = ("search", "selection", "holdout")
Span = dict[str, Any]
"""An interval as verdict.json has it: value, low, high."""


def scores_section(material: Material) -> str:
    """The table of scores; empty without a verdict."""
    verdict = material.verdict
    if verdict is None:
        return ""
    tasks, title = list(verdict["tasks"]), candidate_title(verdict)
    holdout = verdict["holdout"]
    names = ["winner", *(c["name"] for c in verdict["comparisons"])]
    means = [verdict["score"], *({"value": c["score"], "low": None, "high": None} for c in verdict["comparisons"])]
    mean_scale = scale_of(means)
    gap_scale = scale_of([c["difference"] for c in verdict["comparisons"]], [0.0])
    scales = {task: scale_of([holdout[name][task] for name in names]) for task in tasks}
    head = ["model", "mean", GAIN, *(escape(task) for task in tasks)]

    best = {task: max(holdout[name][task]["value"] for name in names) for task in tasks}

    def cells(name: str) -> list[str]:
        return [marked(holdout[name][task], scales[task], best=best[task]) for task in tasks]

    chosen = f"<b>{escape(title)}</b>" + ("" if title == verdict["chosen"]["name"] else chip(verdict["chosen"]["name"]))
    rows = [[chosen, marked(verdict["score"], mean_scale), "", *cells("winner")]]
    for comparison, mean in zip(verdict["comparisons"], means[1:], strict=True):
        kind = chip(comparison["kind"]) if comparison["kind"] != comparison["name"] else ""
        rows.append([
            escape(comparison["name"]) + kind,
            marked(mean, mean_scale),
            gap(comparison, gap_scale),
            *cells(comparison["name"]),
        ])  # fmt: skip
    return section(
        "scores",
        "Scores on the holdout items",
        table(head, rows, "scores"),
        text(explanation(verdict), "dim"),
        guards_table(verdict.get("guards", [])),
        tasks_table(verdict),
        agreement_text(material),
    )


def guards_table(guards: Sequence[dict[str, Any]]) -> str:
    """Every guard with the candidate's drop and what is allowed; empty without guards."""
    if not guards:
        return ""
    scale = scale_of([guard["drop"] for guard in guards], [0.0, *(guard["max_drop"] for guard in guards)])
    states = {"kept": "good", "broken": "bad"}
    rows = [
        [
            escape(guard["name"]),
            drop_mark(guard["drop"], scale),
            f"{guard['max_drop']:g} against {escape(guard['of'])}",
            chip(guard["state"], states.get(guard["state"], "")),
        ]
        for guard in guards
    ]
    return "<h3>Guards</h3>" + table(["guard", "drop", "allowed", "state"], rows, "scores plain")


def drop_mark(drop: Span, scale: tuple[float, float]) -> str:
    """The drop of a guard's metric, with its interval."""
    small = "" if drop["low"] is None else f"<small>{drop['low']:+.3f} to {drop['high']:+.3f}</small>"
    return f"<b>{drop['value']:+.3f}</b>{small}{span_mark(drop['value'], drop['low'], drop['high'], scale)}"


def tasks_table(verdict: dict[str, Any]) -> str:
    """Metric, objective and numbers of items by task, folded."""
    rows = [
        [escape(name), escape(t["metric"]), escape(t["objective"]), *(str(t["items"].get(s, "")) for s in SPLITS)]
        for name, t in verdict["tasks"].items()
    ]
    return folded("Metrics and items", table(["task", "metric", "objective of the search", *SPLITS], rows, "plain"))


def agreement_text(material: Material) -> str:
    """Whether objective and metric rank models alike: folded if they do."""
    found = material.status.agreements
    words = "".join(text(f"{agreement.sentence}.", "dim") for agreement in found)
    if not found or any(agreement.disagrees for agreement in found):
        return words
    return folded("Objective and metric rank models alike", words)


def marked(span: Span, scale: tuple[float, float], best: float | None = None) -> str:
    """An estimate, its interval in small, and its mark.  best: the highest one of its column."""
    low, high = span["low"], span["high"]
    small = "" if low is None else f"<small>{low:.3f} to {high:.3f}</small>"
    kind = " class=best" if span["value"] == best else ""
    return f"<b{kind}>{span['value']:.3f}</b>{small}{span_mark(span['value'], low, high, scale)}"


def gap(comparison: dict[str, Any], scale: tuple[float, float]) -> str:
    """The candidate's difference to a baseline, as text and as a mark."""
    span = comparison["difference"]
    if comparison.get("same") or span["low"] is None:
        return escape(difference_text(comparison))
    kind = "good" if span["low"] > 0 else "bad" if span["high"] < 0 else "even"
    small = f"<small>{span['low']:+.3f} to {span['high']:+.3f}</small>"
    return f"<b>{span['value']:+.3f}</b>{small}{span_mark(span['value'], span['low'], span['high'], scale, kind)}"


def scale_of(spans: Iterable[Span], others: Sequence[float] = ()) -> tuple[float, float]:
    """The values at the ends of the bars of a column.  others: values that must lie within too."""
    found = [x for span in spans for x in (span["value"], span["low"], span["high"]) if x is not None]
    found += others
    low, high = min(found, default=0.0), max(found, default=1.0)
    free = (high - low) * 0.04 or 0.01
    return low - free, high + free


def explanation(verdict: dict[str, Any]) -> str:
    """What the numbers of the table mean."""
    return (
        f"{GAIN_MEANS}. Bars are 90% intervals (5% on each side). The mean is that over tasks "
        f"by their weights. The candidate is {verdict['chosen']['name']}, chosen among "
        f"{len(verdict['finalists'])} models on the selection split."
    )
