"""The scores in a model card."""

from typing import Any


def results_section(verdict: dict[str, Any]) -> str:
    """The verdict as Markdown: the sentence and the holdout table with its intervals."""
    tasks = list(verdict["tasks"])
    head = f"| holdout | mean | {' | '.join(tasks)} |"
    rows = [head, "|---" * (2 + len(tasks)) + "|"]
    score = verdict["score"]
    title = "**chosen candidate**" if not verdict["winner"] else "**winner**"
    rows.append(row(title, f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]", verdict, "winner", tasks))
    for c in verdict["comparisons"]:
        d = c["difference"]
        gap = f"{c['score']:.3f} (candidate {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}])"
        rows.append(row(c["name"], gap, verdict, c["name"], tasks))
    counts = ", ".join(f"{name}: {t['metric']}, {t['items']['holdout']} items" for name, t in verdict["tasks"].items())
    note = f"95% bootstrap intervals, paired differences; items that the search never saw ({counts}). "
    note += verdict.get("greedy_soup", "")
    if code := [name for name, t in verdict["tasks"].items() if t.get("code")]:
        note += f"\n\nThis result used Python code of the task {', '.join(code)} (`allow_task_code`)."
    which = (
        "" if verdict["winner"] else f"This folder holds the recommended simpler model: {verdict['recommended']}.\n\n"
    )
    return f"## Result\n\n{verdict['sentence']}\n\n{which}" + "\n".join(rows) + f"\n\n{note}\n"


def row(title: str, mean: str, verdict: dict[str, Any], key: str, tasks: list[str]) -> str:
    scores = verdict["holdout"][key]
    cells = " | ".join(f"{scores[t]['value']:.3f} [{scores[t]['low']:.3f}, {scores[t]['high']:.3f}]" for t in tasks)
    return f"| {title} | {mean} | {cells} |"
