"""Score the live model on prepared items: the model runs forwards, everything else was done before."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from evomerge.config.schema import GOLD_METRICS
from evomerge.errors import EvomergeError
from evomerge.evaluate.capabilities import probe
from evomerge.evaluate.clock import Clock, forwards_of
from evomerge.evaluate.generation import Stops, generate, plan_generation
from evomerge.evaluate.kv_cache import KeysValues
from evomerge.evaluate.loglikelihood import Plan, plan_batches, score_batches
from evomerge.evaluate.metrics import (
    ItemMetrics,
    choice_metrics,
    gold_choice,
    gold_metrics,
    item_score,
    lm_eval_metrics,
)
from evomerge.evaluate.prefix_plan import ALONE, Tokens, choose_trunks
from evomerge.evaluate.requests import Requests
from evomerge.evaluate.taskfile import reason
from evomerge.evaluate.tasks import FEWSHOT_SEED, Item, Task
from evomerge.evaluate.token_budget import LEAST, token_budget
from evomerge.evaluate.workload import Workload, join_workloads

Trunks = dict[Tokens, KeysValues]
"""What a candidate has computed of shared prefixes: to be thrown away with the candidate."""


class Engine:
    """Scores one live model.  Tokenisation follows lm-eval's HFLM, whose methods are used for it.

    model: a causal language model of transformers.  batch_tokens: padded tokens per forward (`auto` asks
    the device), halved for good when the memory does not hold them.  log: gets a line for all that the model cannot do.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int | Literal["auto"],
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model = model
        self.tokenizer = tokenizer
        self.log = log
        self.lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
        self.requests = Requests(self.lm)
        end = {self.lm.eot_token_id, *as_list(getattr(model.generation_config, "eos_token_id", None))}
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.stops = Stops(tokenizer, self.vocabulary, {int(t) for t in end if t is not None})
        self.batch_tokens = token_budget(batch_tokens, model)
        self.capabilities = probe(model, self.vocabulary, log)
        self.unpacked: set[str] = set()  # tasks whose rows are too long to share one

    def prepare(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        """Build prompts, token ids and batches of a task's items.

        everything: all of the task's metrics and the gold answer's log-probability; else only the objective.
        EvomergeError if an item has an empty answer or does not fit the model.
        """
        work = self.asked(task, items, everything)
        self.plan(work)
        return work

    def in_chunks(self, asked: Sequence[Workload], chunks: Sequence[Sequence[Sequence[int]]]) -> list[Workload]:
        """Tasks whose items are scored chunk by chunk, all tasks of a chunk in the same batches.

        chunks: for each of them and each task, the places of its items.  What all chunks begin with is found over all
        of them, so that a candidate which carries its `Trunks` from chunk to chunk computes it once.
        """
        works = [
            join_workloads([work.pick(where) for work, where in zip(asked, chunk, strict=True) if len(where)])
            for chunk in chunks
        ]
        if self.capabilities.trunks:
            rows = [row.leaf for work in asked for row in work.rows]
            prompts = [prompt.leaf for work in asked for prompt in work.prompts]
            shared = [*choose_trunks(rows), *choose_trunks(prompts, ALONE)]
            for work in works:
                work.shared = shared
        for work in works:
            self.plan(work)
        return works

    def asked(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        """What the model is asked for these items, tokenised, without batches.

        EvomergeError if the task's templates, choices or examples do not fit its documents.
        """
        try:
            return self.ask_each(task, items, everything)
        except EvomergeError:
            raise
        except Exception as error:  # a template, a choice, an index: each fails in its own way
            raise EvomergeError(
                f"task {task.name}: its items cannot be asked ({type(error).__name__}: {reason(error)}); do the "
                "templates fit the documents?"
            ) from error

    def ask_each(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        task.lm.set_fewshot_seed(FEWSHOT_SEED)  # lm-eval draws examples in turn: start anew, or each call differs
        only_gold = not everything and task.objective in GOLD_METRICS and task.kind != "loglikelihood_rolling"
        work = Workload(task, list(items), metrics=not only_gold)
        for item in work.items:
            instances = self.requests.instances(task, item)
            spans: list[range] = []
            gold, answer = -1, ""
            first_row, first_prompt = len(work.rows), len(work.prompts)
            for instance in [] if only_gold and task.kind == "generate_until" else instances:
                if instance.request_type == "generate_until":
                    work.prompts.append(self.requests.prompt(task, *instance.args))
                    continue
                if only_gold and task.kind == "multiple_choice" and instance.idx != gold_choice(task, item.doc):
                    continue
                new = self.requests.rows(task, instance)
                spans.append(range(len(work.rows), len(work.rows) + len(new)))
                work.rows += new
            if task.kind == "generate_until" and (everything or only_gold):
                gold = len(work.rows)
                context, answer = self.requests.gold_pair(task, item, instances[0].args[0])
                work.rows.append(self.requests.row(task, context, answer))
            elif task.kind == "multiple_choice":
                choice = gold_choice(task, item.doc)
                gold, answer = spans[0 if only_gold else choice].start, instances[choice].args[1]
            elif task.kind == "loglikelihood":
                gold, answer = spans[0].start, instances[0].args[1]
            work.instances.append(instances)
            work.spans.append(spans)
            work.gold.append(gold)
            work.gold_bytes.append(len(answer.encode("utf-8")))
            work.own_rows.append(range(first_row, len(work.rows)))
            work.own_prompts.append(range(first_prompt, len(work.prompts)))
        return work

    def plan(self, work: Workload) -> None:
        """Make the batches of a workload for the present budget."""
        work.budget = self.batch_tokens
        too_long = [part for part in work.by_task if not self.capabilities.reaches(part.longest)]
        work.packs = self.capabilities.packs and not too_long
        for part in too_long if self.capabilities.packs else []:
            if part.task.name not in self.unpacked:  # once, not for every chunk
                self.unpacked.add(part.task.name)
                self.log(
                    f"note: task {part.task.name} has rows of {part.longest} tokens, the model attends to "
                    f"{self.capabilities.window}; one row a sequence"
                )
        shared = work.shared if self.capabilities.trunks else []
        plan = Plan(work.budget, self.model.device, self.vocabulary, work.packs, shared)
        work.batches = plan_batches(work.rows, plan)
        work.generations = plan_generation(work.prompts, self.tokenizer.pad_token_id or 0, plan)

    def score(self, work: Workload, clock: Clock, trunks: Trunks | None = None) -> ItemMetrics:
        """Every metric of one task's workload for the model's present weights, one raw value per item.

        Trunks and errors: see `score_parts`.
        """
        (found,) = self.score_parts(work, clock, trunks)
        return found

    def score_parts(self, work: Workload, clock: Clock, trunks: Trunks | None = None) -> list[ItemMetrics]:
        """`score` for each part of a workload of several tasks.

        trunks: what this very candidate has computed of shared prefixes in other chunks; added to.
        NotFiniteScore if a log-likelihood is NaN or infinite.  Out of memory, the budget is halved for good and the
        workload begun anew.
        """
        while True:
            if work.budget != self.batch_tokens:
                self.plan(work)
            try:
                return self.score_planned(work, clock, trunks)
            except torch.OutOfMemoryError:
                if self.batch_tokens <= LEAST:
                    raise
            self.batch_tokens = max(LEAST, self.batch_tokens // 2)
            self.log(f"note: out of memory; from now on {self.batch_tokens} tokens a batch")
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def score_planned(self, work: Workload, clock: Clock, trunks: Trunks | None) -> list[ItemMetrics]:
        lls = score_batches(self.model, work.batches, len(work.rows), clock, trunks) if work.rows else []
        answers = self.answers(work, clock, trunks) if work.prompts else []
        found, row, prompt = [], 0, 0
        with clock.time("score"):
            for part in work.by_task:
                last_row, last_prompt = row + len(part.rows), prompt + len(part.prompts)
                found.append(self.metrics(part, lls[row:last_row], answers[prompt:last_prompt]))
                row, prompt = last_row, last_prompt
        return found

    def metrics(self, work: Workload, lls: Sequence[tuple[float, bool]], answers: Sequence[str]) -> ItemMetrics:
        """The metrics of one task from the answers to its requests."""
        found: ItemMetrics = {}
        if work.metrics:
            texts = iter(answers)
            for spans, instances in zip(work.spans, work.instances, strict=True):
                for k, instance in enumerate(instances):
                    instance.resps = [self.response(instance, spans, k, lls, texts)]
            found = lm_eval_metrics(work.task, work.items, work.instances)
            if work.task.kind == "multiple_choice":
                choices = [[lls[span.start][0] for span in spans] for spans in work.spans]
                gold = [spans.index(range(g, g + 1)) for spans, g in zip(work.spans, work.gold, strict=True)]
                found |= choice_metrics(choices, gold)
        if all(g >= 0 for g in work.gold):
            found |= gold_metrics([lls[g][0] for g in work.gold], work.gold_bytes)
        return found

    def response(self, instance: Any, spans: list[range], k: int, lls: Sequence[tuple[float, bool]], texts: Any) -> Any:
        """What lm-eval's model would have answered to one request."""
        if instance.request_type == "generate_until":
            return next(texts)
        if instance.request_type == "loglikelihood_rolling":
            return sum(lls[r][0] for r in spans[k])
        return lls[spans[k].start]

    def answers(self, work: Workload, clock: Clock, trunks: Trunks | None) -> list[str]:
        """The generated text of every prompt."""
        if self.capabilities.steps:
            count = len(work.prompts)
            tokens = generate(self.model, work.generations, count, self.stops, clock, work.packs, trunks)
            with clock.time("score"):
                return [self.text(t, p.until) for t, p in zip(tokens, work.prompts, strict=True)]
        clock.check()
        with clock.time("forward"), forwards_of(self.model, clock.counts):
            asked = [i for group in work.instances for i in group if i.request_type == "generate_until"]
            return list(self.lm.generate_until(asked, disable_tqdm=True))

    def text(self, tokens: list[int], until: Sequence[str]) -> str:
        """Generated tokens as text, cut at the first stop string."""
        from lm_eval.models.utils import postprocess_generated_text

        if tokens and tokens[-1] in self.stops.end_tokens:
            tokens = tokens[:-1]
        text: str = self.lm.tok_decode(tokens)
        return str(postprocess_generated_text(text, list(until), None))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def scores_of(task: Task, metric: str, found: ItemMetrics) -> list[float]:
    """The item scores of one metric, the higher the better.  EvomergeError if it was not computed."""
    if metric not in found:
        raise EvomergeError(f"task {task.name}: the metric {metric!r} was not computed; there are {', '.join(found)}")
    return [item_score(task, metric, value) for value in found[metric]]
