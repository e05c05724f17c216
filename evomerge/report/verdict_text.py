"""A verdict in words: remarks for the terminal and report.html, and the section of a model card."""

from typing import Any


def interval_text(span: dict[str, Any], signed: bool = False) -> str:
    """An estimate with its interval, such as `0.532 [0.502, 0.561]`.  signed: with a sign, for differences."""
    sign = "+" if signed else ""
    value = f"{span['value']:{sign}.3f}"
    return value if span["low"] is None else f"{value} [{span['low']:{sign}.3f}, {span['high']:{sign}.3f}]"


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
            f"With these items, a true gain of {verdict['detectable']:.3f} would be shown with a probability of 80%."
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
    head = f"| holdout | mean | {' | '.join(tasks)} |"
    rows = [head, "|---" * (2 + len(tasks)) + "|"]
    score = verdict["score"]
    title = "**chosen candidate**" if not verdict["winner"] else "**winner**"
    rows.append(row(title, interval_text(score), verdict, "winner", tasks))
    for c in verdict["comparisons"]:
        gap = f"{c['score']:.3f} (candidate {interval_text(c['difference'], signed=True)})"
        rows.append(row(c["name"], gap, verdict, c["name"], tasks))
    counts = ", ".join(f"{name}: {t['metric']}, {t['items']['holdout']} items" for name, t in verdict["tasks"].items())
    note = f"90% intervals (5% on each side), paired differences; items that the search never saw ({counts}). "
    note += " ".join(remarks(verdict))
    if code := [name for name, t in verdict["tasks"].items() if t.get("code")]:
        note += f"\n\nThis result used Python code of the task {', '.join(code)} (`allow_task_code`)."
    recommended = model or verdict["recommended"]
    which = "" if recommended == "winner" else f"This folder holds the recommended simpler model: {recommended}.\n\n"
    return f"## Result\n\n{verdict['sentence']}\n\n{which}" + "\n".join(rows) + f"\n\n{note}\n"


def row(title: str, mean: str, verdict: dict[str, Any], key: str, tasks: list[str]) -> str:
    """A row of the Markdown table.  key: of the model in `verdict["holdout"]`."""
    scores = verdict["holdout"][key]
    cells = " | ".join(interval_text(scores[t]) for t in tasks)
    return f"| {title} | {mean} | {cells} |"
