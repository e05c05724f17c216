"""What a model is asked, kept in a folder: prompts, choices, targets and token ids, one item a line.

A resumed run reads them back and tokenises nothing.  The first line of a file is a hash of all that its content
depends on; a file that does not match, or is damaged, is written anew.
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
from evomerge.evaluate.workload import Workload
from evomerge.files import written_aside


def ask(engine: Engine, task: Task, split: Split, items: Sequence[Item], everything: bool, folder: Path) -> Workload:
    """`engine.asked` for the items of a split, from the folder if it is there."""
    what = "all" if everything else "objective"
    file = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.name)}-{split}-{what}.jsonl"
    key = items_key(engine, task, items, everything)
    found = read(file, key, task, items)
    if found is None:
        found = engine.asked(task, items, everything)
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
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def write(file: Path, key: str, split: Split, work: Workload) -> None:
    with written_aside(file) as aside, aside.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"key": key, "metrics": work.metrics, "items": len(work.items)}) + "\n")
        for number, item in enumerate(work.items):
            rows, prompts = work.own_rows[number], work.own_prompts[number]
            line = {
                "item": item.id,
                "task": work.task.name,
                "split": split,
                "target": str(work.task.lm.doc_to_target(item.doc)),
                "requests": [[i.request_type, i.idx, list(i.args)] for i in work.instances[number]],
                "rows": [[work.rows[r].tokens, work.rows[r].scored] for r in rows],
                "spans": [[s.start - rows.start, s.stop - rows.start] for s in work.spans[number]],
                "gold": work.gold[number] - rows.start if work.gold[number] >= 0 else None,
                "gold_bytes": work.gold_bytes[number],
                "prompts": [[p.context, p.until, p.limit] for p in (work.prompts[k] for k in prompts)],
            }
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(file: Path, key: str, task: Task, items: Sequence[Item]) -> Workload | None:
    """What `write` wrote of these items under this key, else None."""
    try:
        with file.open(encoding="utf-8") as lines:
            head = json.loads(next(lines))
            if head["key"] != key:
                return None
            found = Workload(task, list(items), metrics=head["metrics"])
            for item, line in zip(items, lines, strict=True):
                add(found, item, json.loads(line))
            return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError):
        return None


def add(work: Workload, item: Item, line: dict[str, Any]) -> None:
    """One line as the next item of a workload."""
    from lm_eval.api.instance import Instance

    if line["item"] != item.id:
        raise ValueError(f"item {item.id} is not the next one")
    rows, prompts = len(work.rows), len(work.prompts)
    work.rows += [Row(tuple(tokens), scored) for tokens, scored in line["rows"]]
    work.prompts += [Prompt(tuple(context), tuple(until), limit) for context, until, limit in line["prompts"]]
    work.own_rows.append(range(rows, len(work.rows)))
    work.own_prompts.append(range(prompts, len(work.prompts)))
    work.spans.append([range(rows + start, rows + stop) for start, stop in line["spans"]])
    work.gold.append(-1 if line["gold"] is None else rows + line["gold"])
    work.gold_bytes.append(line["gold_bytes"])
    work.instances.append(
        [
            Instance(kind, item.doc, tuple(arguments), idx, metadata=(work.task.name, 0, 1))
            for kind, idx, arguments in line["requests"]
        ]
    )
