"""Search items as prompts of a playground."""

from collections.abc import Iterable
from dataclasses import dataclass

from evomerge.evaluate.answers import gold_of
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.workload import Workload
from evomerge.play.answer import in_chat


@dataclass(frozen=True)
class Example:
    """A search item as a prompt.

    prompt: as the model sees it, with examples and chat template; with `chat` without the template.
    gold: the right answer.
    chat, stop, limit: see `answer.prompt_of`.
    """

    task: str
    prompt: str
    gold: str
    chat: bool
    stop: str
    limit: int


def examples_of(engine: Engine, workloads: Iterable[Workload]) -> list[Example]:
    """The items of all tasks that have prompts."""
    found = []
    end = engine.lm.tok_decode(engine.lm.eot_token_id, skip_special_tokens=False)
    for work in workloads:
        if work.task.is_python or work.task.kind == "loglikelihood_rolling":
            continue  # it has no prompts
        for asked in work.items:
            stop, limit = "\n", 32
            if asked.prompts:
                limit = asked.prompts[0].limit
                stop = next((s for s in asked.prompts[0].until if s != end), "")
            prompt, question = str(asked.instances[0].args[0]), str(work.task.lm.doc_to_text(asked.item.doc))
            chat = work.task.chat and in_chat(engine, question) == prompt
            gold = gold_of(work.task, asked.item)
            found.append(Example(work.task.name, question if chat else prompt, gold, chat, stop, limit))
    return found
