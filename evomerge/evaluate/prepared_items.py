"""The requests of items as files, one item a line: prompts, choices, targets and token ids.

A resumed run reads them and tokenises nothing.  The first line of a file has a hash of everything that the content
depends on; a file that is damaged or has another hash is written again.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.generation import Prompt
from evomerge.evaluate.loglikelihood import Row
from evomerge.evaluate.tasks import Item, Split, Task
from evomerge.evaluate.workload import ItemRequests, Workload
from evomerge.files.write import written_aside


def prepared_workload(
    engine: Engine, task: Task, split: Split, items: Sequence[Item], everything: bool, folder: Path
) -> Workload:
    """`engine.workload` for the items of a split; read from `folder` if its file is there, else built and written.

    Of a Python task nothing is kept, because nothing is built.
    """
    if task.is_python:
        return engine.workload(task, items, everything)
    what = "all" if everything else "objective"
    file = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.name)}-{split}-{what}.jsonl"
    key = items_key(engine, task, items, everything)
    found = read(file, key, task, items)
    if found is None:
        found = engine.workload(task, items, everything)
        write(file, key, split, found)
    return found


def items_key(engine: Engine, task: Task, items: Sequence[Item], everything: bool) -> str:
    """A hash of the items, the task with its examples, the tokenizer and the programs that make prompts of them."""
    tokenizer = engine.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what = [
        [i.id for i in items],
        everything,
        [task.name, task.objective, task.gold, task.chat, task.multiturn, task.lm.dump_config()],
        list(task.lm.fewshot_docs()) if task.lm.config.num_fewshot else [],
        backend.to_str() if backend is not None else tokenizer.get_vocab(),
        [tokenizer.chat_template, engine.lm.max_length, engine.lm.prefix_token_id, engine.lm.eot_token_id],
        [__version__, *map(importlib.metadata.version, ("lm_eval", "transformers"))],
        *([name, metric.needs] for name, metric in sorted(task.added.items())),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def write(file: Path, key: str, split: Split, work: Workload) -> None:
    """Write the requests of a workload of one task."""
    with written_aside(file) as aside, aside.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"key": key, "metrics": work.complete, "items": len(work.items)}) + "\n")
        for asked in work.items:
            line = {
                "item": asked.item.id,
                "task": work.task.name,
                "split": split,
                "target": str(work.task.lm.doc_to_target(asked.item.doc)),
                "requests": [[i.request_type, i.idx, list(i.args)] for i in asked.instances],
                "rows": [[row.tokens, row.scored] for row in asked.rows],
                "spans": [[span.start, span.stop] for span in asked.spans],
                "gold": asked.gold,
                "gold_bytes": asked.gold_bytes,
                "prompts": [[p.context, p.until, p.limit] for p in asked.prompts],
            }
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(file: Path, key: str, task: Task, items: Sequence[Item]) -> Workload | None:
    """What `write` wrote for these items under this key; None if the file is absent, damaged or has another key."""
    try:
        with file.open(encoding="utf-8") as lines:
            head = json.loads(next(lines))
            if head["key"] != key:
                return None
            asked = [read_item(task, item, json.loads(line)) for item, line in zip(items, lines, strict=True)]
            return Workload(task, asked, complete=head["metrics"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError):
        return None


def read_item(task: Task, item: Item, line: dict[str, Any]) -> ItemRequests:
    """The requests of one item.  ValueError if the line is that of another item."""
    from lm_eval.api.instance import Instance

    if line["item"] != item.id:
        raise ValueError(f"item {item.id} is not the next one")
    return ItemRequests(
        item,
        instances=[
            Instance(kind, item.doc, tuple(arguments), idx, metadata=(task.name, 0, 1))
            for kind, idx, arguments in line["requests"]
        ],
        rows=[Row(tuple(tokens), scored) for tokens, scored in line["rows"]],
        spans=[range(start, stop) for start, stop in line["spans"]],
        prompts=[Prompt(tuple(context), tuple(until), limit) for context, until, limit in line["prompts"]],
        gold=line["gold"],
        gold_bytes=line["gold_bytes"],
    )
