"""The answers that changed: the holdout items that the candidate gained and lost against the best parent."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from evomerge.errors import EvomergeError
from evomerge.report.page.material import Material
from evomerge.report.page.parts import chip, section, table, text
from evomerge.search.storage.answers import Asked, Said, read_answers, read_items
from evomerge.search.storage.item_scores import (
    EVALUATIONS,
    evaluation_record,
    evaluation_records,
    item_ids,
    unpack,
)

MOST = 120  # items of each kind that are shown
SHORT = 600  # characters of a prompt's end and of an answer that are shown
CHANGED = 1e-6  # a smaller change of a score is a rounding error

Change = Literal["gained", "lost"]


@dataclass(frozen=True)
class Changed:
    """An item on which candidate and parent differ by the metric.

    before, after: the parent's score and the candidate's.
    """

    task: str
    item: str
    before: float
    after: float

    @property
    def kind(self) -> Change:
        return "gained" if self.after > self.before else "lost"


def answers_section(material: Material) -> str:
    """The items gained and lost; empty without a verdict, or without a parent to compare with."""
    verdict = material.verdict
    parent = next((c["name"] for c in (verdict or {"comparisons": []})["comparisons"] if c["kind"] == "parent"), None)
    if verdict is None or parent is None:
        return ""
    own, other = verdict["chosen"].get("recipe", ""), digest_of(material, parent)
    title = f"Answers that changed against {parent}"
    try:
        found = changes(material, own, other)
        items = read_items(material.run.answers_folder).tasks
        before, after = (read_answers(material.run.answers_folder, d).tasks for d in (other, own))
    except EvomergeError as error:
        return section("answers", title, text(f"They cannot be read: {error}.", "dim"))
    counts = Counter((c.task, c.kind) for c in found)
    rows = [
        [escape(task), str(t["items"]["holdout"]), str(counts[task, "gained"]), str(counts[task, "lost"])]
        for task, t in verdict["tasks"].items()
        if t.get("weight", 1.0) > 0
    ]
    known = [c for c in found if c.item in items.get(c.task, {})]
    shown = [c for kind in ("gained", "lost") for c in spread([k for k in known if k.kind == kind])]
    content = [
        text(f"{parent} is the parent that was best on the selection items. Gained: the candidate's score is higher."),
        table(["task", "holdout items", "gained", "lost"], rows, "numbers"),
    ]
    if found and not known:
        content.append(text("The answers themselves were not kept: an earlier version made this run.", "dim"))
    if shown:
        content.append(filters(list(verdict["tasks"])))
        cards = (
            card(
                c, items[c.task][c.item], parent, before.get(c.task, {}).get(c.item), after.get(c.task, {}).get(c.item)
            )
            for c in shown
        )
        content.append(f"<div class=items>{''.join(cards)}</div>")
        cut = f" {len(shown)} of {len(known)} are here." if len(shown) < len(known) else ""
        content.append(
            text(f"Whoever changes a search because of these items should judge it by others afterwards.{cut}", "dim")
        )
    return section("answers", title, *content)


def digest_of(material: Material, name: str) -> str:
    """The digest of the recipe of a model that was scored on the holdout split; empty if there is none."""
    for key, record in evaluation_records(material.attributes, ["holdout"]).items():
        if record.name == name:
            return key.removeprefix(EVALUATIONS).partition(":")[2]
    return ""


def changes(material: Material, own: str, other: str) -> list[Changed]:
    """The holdout items of the goals whose metric differs between two models, task by task.

    own, other: digests of the candidate's recipe and of the parent's.
    """
    assert material.verdict is not None, "changes are those of a verdict"
    tables = [scores_by_item(material, digest) for digest in (other, own)]
    found = []
    for task, judged in material.verdict["tasks"].items():
        before, after = (t.get((task, judged["metric"]), {}) for t in tables)
        for item in before.keys() & after.keys() if judged.get("weight", 1.0) > 0 else ():
            if abs(after[item] - before[item]) > CHANGED:
                found.append(Changed(task, item, before[item], after[item]))
    order = list(material.verdict["tasks"])
    return sorted(found, key=lambda c: (order.index(c.task), -abs(c.after - c.before), c.item))


def scores_by_item(material: Material, digest: str) -> dict[tuple[str, str], dict[str, float]]:
    """(Task, metric) -> item id -> the score, of a model on the holdout split."""
    record = evaluation_record(material.attributes, "holdout", digest)
    if not record.scores:
        return {}
    ids = item_ids(material.attributes, record)
    return {
        (task, metric): dict(zip(ids[task], unpack(packed).tolist(), strict=True))
        for task, metrics in record.scores.items()
        for metric, packed in metrics.items()
    }


def spread(found: Sequence[Changed]) -> list[Changed]:
    """At most MOST of the items, of every task about the same share."""
    if len(found) <= MOST:
        return list(found)
    return [found[k * len(found) // MOST] for k in range(MOST)]


def filters(tasks: Sequence[str]) -> str:
    """What chooses among the items."""
    options = "".join(f"<option>{escape(task)}</option>" for task in tasks)
    return (
        "<div class=filters><select aria-label='kind of change'><option value=''>gained and lost</option>"
        "<option>gained</option><option>lost</option></select>"
        f"<select aria-label=task><option value=''>all tasks</option>{options}</select>"
        "<input type=search placeholder='search prompts and answers' aria-label=search></div>"
        "<p class='dim shown'></p>"
    )


def card(changed: Changed, asked: Asked, parent: str, before: Said | None, after: Said | None) -> str:
    """One item with its prompt, both answers and the gold answer."""
    kind = {"gained": "good", "lost": "bad"}[changed.kind]
    rows = [
        (parent, said(before), mark(changed.before)),
        ("candidate", said(after), mark(changed.after)),
        ("gold", asked.gold[:SHORT], ""),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)} {score}</dd>" for name, words, score in rows)
    data = f"data-change={changed.kind} data-task='{escape(changed.task, quote=True)}'"
    return (
        f"<div class=item {data}><div>{chip(changed.kind, kind)}{chip(changed.task)}"
        f"<pre>{escape(ending(asked.prompt))}</pre></div><dl>{listed}</dl></div>"
    )


def said(answer: Said | None) -> str:
    """An answer, and what the filter took of it if that is something else; empty where a task only scores texts."""
    if answer is None:
        return ""
    taken = answer.taken if answer.taken.strip() and answer.taken.strip() != answer.text.strip() else ""
    return f"{answer.text.strip()[:SHORT]}{f' → {taken[:SHORT]}' if taken else ''}"


def mark(score: float) -> str:
    """The score of an answer: right, wrong, or its number."""
    signs = {0.0: ("bad", "✗"), 1.0: ("good", "✓")}
    kind, sign = signs.get(score, ("dim", f"{score:.3g}"))
    return f"<span class={kind} title='score {score:.3g}'>{sign}</span>"


def ending(prompt: str) -> str:
    """The end of a prompt, where the question is."""
    return prompt.strip() if len(prompt) <= SHORT else "… " + prompt[-SHORT:].strip()
