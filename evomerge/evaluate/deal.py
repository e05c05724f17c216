"""Deal a task's items to the search, the selection and the holdout split; no item is in two of them."""

import hashlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

from evomerge.config.tasks import Share, SplitsConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.bounds import only_bounds, within_bounds
from evomerge.evaluate.tasks import SPLITS, Item, Split, Task, items_of


def deal(task: Task, splits: SplitsConfig, seed: int) -> dict[Split, list[Item]]:
    """Deal a task's items to the three splits; no item is in two of them.

    splits: for each split a count, a share, or the name of one of the task's own splits.
    seed: of the deal.

    Counts and shares are dealt from the documents that lm-eval evaluates, in the order of a seeded hash of the item, so
    the deal does not depend on the order of the data.  Items with the same question come one after another; of those at
    the end of a split the rest is in no other split.  EvomergeError if there are too few items.
    """
    wanted: dict[Split, Share] = {name: getattr(splits, name) for name in SPLITS}
    dealt: dict[Split, list[Item]] = {}
    taken: set[str] = set()
    for name, share in wanted.items():
        if isinstance(share, str):
            dealt[name] = [i for i in items_of(task, own_split(task, share)) if i.id not in taken]
            taken |= {i.id for i in dealt[name]}
    pool = [i for i in items_of(task, task.docs) if i.id not in taken]
    total = len(pool)
    position = {item.id: n for n, item in enumerate(pool)}  # in the data's order
    questions, seen = questions_of(task, pool), dict[str, str]()
    # item id -> the id of the first item with the same question
    first = {i.id: seen.setdefault(text, i.id) if (text := questions.get(i.id)) else i.id for i in pool}

    def order(item_id: str) -> str:
        return hashlib.sha256(f"{seed}\0{item_id}".encode()).hexdigest()

    pool.sort(key=lambda i: (order(first[i.id]), order(i.id)))
    for name, share in wanted.items():
        if isinstance(share, str):
            continue
        count = share if isinstance(share, int) else int(share * total + 1e-9)  # 0.29 * 100 is a little less than 29
        if count > len(pool) or count < 1:
            raise EvomergeError(
                f"task {task.name}: has {total} items to deal, too few for the splits "
                f"(search {splits.search}, selection {splits.selection}, holdout {splits.holdout})"
            )
        dealt[name] = sorted(pool[:count], key=lambda i: position[i.id])
        asked = {first[i.id] for i in dealt[name]}
        pool = [i for i in pool[count:] if first[i.id] not in asked]
    if empty := [name for name, items in dealt.items() if not items]:
        raise EvomergeError(f"task {task.name}: no item is left for the {empty[0]} split")
    return dealt


def questions_of(task: Task, items: Iterable[Item]) -> dict[str, str]:
    """Item id -> the text of its question, without spaces around it; empty if most items have the same text."""
    texts: dict[str, str] = {}
    with within_bounds(f"task {task.name}: the texts of an item") as again:
        for item in items:
            again()
            texts[item.id] = item.id
            with only_bounds():  # a template that does not fit is reported where prompts are built
                texts[item.id] = str(task.lm.doc_to_text(item.doc)).strip()
    return texts if 2 * len(set(texts.values())) > len(texts) else {}


def own_split(task: Task, name: str) -> Iterable[dict[str, Any]]:
    """The documents of the task's own `train`, `validation` or `test` split.  EvomergeError if it has no such split."""
    docs = {"train": task.lm.training_docs, "validation": task.lm.validation_docs, "test": task.lm.test_docs}[name]()
    if docs is None:
        raise EvomergeError(f"task {task.name}: has no {name} split of its own; give a number of items instead")
    return islice(docs, task.limit)
