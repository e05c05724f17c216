"""Whether prompts begin as the base was trained: with the beginning-of-text token, once.

lm-eval encodes prompts as the tokenizer does, and a tokenizer may have lost the rule that adds the token: when it was
saved by a training framework, or because its class ignores `add_bos_token`.  Some models hardly need the token, others
are lost without it, so the loss is measured with and without it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.evaluate.clock import Clock
from evomerge.files.read import read_json
from evomerge.search.check.concerns import Concern
from evomerge.search.check.paths import mean_loss
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.space.baselines import Baseline

ITEMS, TOKENS = 16, 256  # of all tasks; of a prompt with its answer
WORSE, DECLARED = 0.2, 0.05  # nats a token; where the tokenizer's settings say that it adds the token


def first_token_concerns(evaluator: Evaluator, base: Baseline) -> Iterator[Concern]:
    """Prompts without the token where it helps the base, or with two of it."""
    tokenizer, tasks = evaluator.engine.tokenizer, [t for t in evaluator.task_set.tasks if not t.is_python]
    if not tasks:
        return
    token = beginning(evaluator.bank.models.base.config)
    token = tokenizer.bos_token_id if token is None else token
    if token is None:
        return
    rows: list[tuple[int, ...]] = []
    twice = set()
    for task in tasks:
        items = evaluator.task_set.items[task.name]["search"][: max(2, ITEMS // len(tasks))]
        work = evaluator.engine.workload(task, items, everything=True)
        found = [asked.rows[asked.gold or 0].tokens for asked in work.items if asked.rows]
        twice |= {task.name for tokens in found if tokens[:2] == (token, token)}
        rows += [tokens for tokens in found if tokens[0] != token and len(tokens) > 1]
    named = tokenizer.decode([token])
    for task_name in sorted(twice):
        what = f"task {task_name}: its prompts begin with {named} twice"
        yield Concern(what, "take it out of the chat template or of `doc_to_text`; the tokenizer adds it")
    if len(rows) < 2:
        return
    evaluator.materialise(base.recipe, Clock(evaluator.check, device=evaluator.bank.live_device))
    model, pairs = evaluator.model, []
    for tokens in rows:
        ids = list(tokens[-TOKENS:])
        pairs.append((mean_loss(model, [(ids, 1)]), mean_loss(model, [([token, *ids], 2)])))
    without, with_token = np.mean(pairs, axis=0)
    gaps = np.subtract(*np.transpose(pairs))
    if with_token > math.log(evaluator.engine.vocabulary):
        return  # no better than a uniform guess: the text is strange to the base, and the difference says nothing
    least = DECLARED if says_so(evaluator.bank.models.base.path) else WORSE
    if without - with_token > max(least, 2 * gaps.std(ddof=1) / len(gaps) ** 0.5):
        what = (
            f"the tokenizer puts no {named} before a prompt, but the base is better with it: a loss of "
            f"{with_token:.2f} instead of {without:.2f} nats a token on {len(gaps)} items"
        )
        mend = (
            "let the base's tokenizer add it: load it with AutoTokenizer, set `add_bos_token = True`, and save it with "
            f"save_pretrained to {evaluator.bank.models.base.path}"
        )
        yield Concern(what, mend)


def says_so(folder: Path) -> bool:
    """Whether a tokenizer's settings ask for the token.  Where its class does not know the key, nothing obeys it."""
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and read_json(settings).get("add_bos_token") is True


def beginning(config: dict[str, Any]) -> int | None:
    """The id of the beginning-of-text token in a model's configuration; None if it has none."""
    found = config.get("bos_token_id", (config.get("text_config") or {}).get("bos_token_id"))
    found = found[0] if isinstance(found, list) and found else found
    return found if type(found) is int else None
