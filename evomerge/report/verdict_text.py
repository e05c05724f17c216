"""A verdict in words: remarks for the terminal and report.html, and the section of a model card."""

import shlex
from pathlib import Path
from typing import Any

from evomerge.printable import in_code, in_markdown

GAIN = "gain over this model"
"""The title of the column of differences in a verdict's table."""
GAIN_MEANS = (
    "Gain over this model: the mean of the first row minus that of this row, on the same items, with its 90% interval; "
    "if 0 lies in the interval, no difference is shown"
)


def interval_text(span: dict[str, Any], signed: bool = False) -> str:
    """An estimate with its interval, such as `0.532 [0.502, 0.561]`.  signed: with a sign, for differences."""
    sign = "+" if signed else ""
    value = f"{span['value']:{sign}.3f}"
    return value if span["low"] is None else f"{value} [{span['low']:{sign}.3f}, {span['high']:{sign}.3f}]"


def difference_text(comparison: dict[str, Any]) -> str:
    """The candidate's difference to a baseline with its interval, or that both answer alike.

    comparison: an entry of `comparisons` in verdict.json.
    """
    same = comparison.get("same", False)
    return "the same score on every item" if same else interval_text(comparison["difference"], signed=True)


def candidate_title(verdict: dict[str, Any]) -> str:
    """What the first row of a verdict's table is called: winner, candidate, or the name of what took its place."""
    if verdict["winner"]:
        return "winner"
    names = {f["name"]: f.get("kind", "candidate") for f in verdict["finalists"] if isinstance(f, dict)}
    chosen = str(verdict["chosen"]["name"])
    return "candidate" if names.get(chosen, "candidate") == "candidate" else chosen


def next_command(verdict: dict[str, Any], folder: Path) -> str:
    """The command that follows from a verdict.  folder: of the run."""
    command = verdict.get("next") or "evomerge export RUN --out merged/"
    return str(command).replace("RUN", shlex.quote(str(folder)), 1)


def remarks(verdict: dict[str, Any]) -> list[str]:
    """The sentences that belong to the table of a verdict."""
    found = [guard_sentence(guard) for guard in verdict.get("guards", [])]
    found += [
        f"{c['name']} breaks {' and '.join(c['breaks'])} on the selection items."
        for c in verdict["comparisons"]
        if c.get("breaks")
    ]
    found += [verdict[key] for key in ("simplified", "greedy_soup") if verdict.get(key)]
    if verdict["detectable"] is not None:
        found.append(
            f"The smallest gain that these items can show is {verdict['detectable']:.3f} (four times in five)."
        )
    if verdict["holdout_uses"] > 1:
        found.append(
            f"The holdout items were used for {verdict['holdout_uses']} candidates of this run, so the intervals are "
            "too narrow."
        )
    return found


def guard_sentence(guard: dict[str, Any]) -> str:
    """Whether the candidate keeps a guard, in words."""
    return (
        f"Guard {guard['name']} is {guard['state']}: {guard['metric']} drops by "
        f"{interval_text(guard['drop'], signed=True)} against {guard['of']}; {guard['max_drop']:g} is allowed."
    )


def results_section(verdict: dict[str, Any], model: str | None = None) -> str:
    """The verdict as Markdown: the sentence and the holdout table with its intervals.

    model: the one in the folder, `winner` or the name of a baseline (default: what the verdict recommends).
    """
    tasks = list(verdict["tasks"])
    title = in_markdown(candidate_title(verdict))
    rows = [
        f"| holdout | mean | {GAIN} | {' | '.join(map(in_markdown, tasks))} |",
        "|---" * (3 + len(tasks)) + "|",
        row(f"**{title}**", interval_text(verdict["score"]), "", verdict, "winner", tasks),
    ]
    rows += [
        row(in_markdown(c["name"]), f"{c['score']:.3f}", difference_text(c), verdict, c["name"], tasks)
        for c in verdict["comparisons"]
    ]
    counts = ", ".join(f"{name}: {t['metric']}, {t['items']['holdout']} items" for name, t in verdict["tasks"].items())
    note = f"{GAIN_MEANS}. 90% intervals have 5% on each side. Items that the search "
    note += in_markdown(f"never saw ({counts}). " + " ".join(remarks(verdict)))
    functions = {name: t["function"] for name, t in verdict["tasks"].items() if "function" in t}
    if code := [name for name, t in verdict["tasks"].items() if t.get("code") and name not in functions]:
        note += f"\n\nThis result used Python code of the task {in_markdown(', '.join(code))} (`allow_task_code`)."
    if functions:
        listed = "; ".join(f"{name}: {function}" for name, function in functions.items())
        note += f"\n\nPython functions gave the scores. {in_markdown(listed)}."
    recommended = model or verdict["recommended"]
    which = ""
    if recommended == copied_model(verdict):
        which = f"**This folder holds a copy of {in_code(recommended)}**: no merge was shown to be better.\n\n"
    elif recommended != "winner":
        which = f"This folder holds the recommended simpler model: {in_markdown(recommended)}.\n\n"
    return f"## Result\n\n{in_markdown(verdict['sentence'])}\n\n{which}" + "\n".join(rows) + f"\n\n{note}\n"


def copied_model(verdict: dict[str, Any]) -> str | None:
    """The name of the parent, or of the base, that a verdict recommends; None if it recommends a merge."""
    kinds = {c["name"]: c["kind"] for c in verdict["comparisons"]}
    kinds |= {f["name"]: f.get("kind", "") for f in verdict["finalists"] if isinstance(f, dict)}
    name = str(verdict["recommended"])
    return name if kinds.get(name) in ("parent", "base") else None


def row(title: str, mean: str, gap: str, verdict: dict[str, Any], key: str, tasks: list[str]) -> str:
    """A row of the Markdown table.

    gap: the candidate's difference to this model.  key: of the model in `verdict["holdout"]`.
    """
    scores = verdict["holdout"][key]
    cells = " | ".join(interval_text(scores[t]) for t in tasks)
    return f"| {title} | {mean} | {gap} | {cells} |"
