"""The engine: score a live model on workloads.  Everything but the model's forwards is prepared once."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from evomerge.device import free_memory
from evomerge.errors import EvomergeError, without_panics
from evomerge.evaluate.answer_metrics import computed, shared_out, task_metrics
from evomerge.evaluate.bounds import within_bounds
from evomerge.evaluate.capabilities import NONE, probe
from evomerge.evaluate.clock import Clock, forwards_of
from evomerge.evaluate.generation import Stops, generate, plan_generation
from evomerge.evaluate.item_values import ItemMetrics
from evomerge.evaluate.kv_cache import KeysValues
from evomerge.evaluate.loglikelihood import Plan, plan_batches, score_batches
from evomerge.evaluate.prefix_plan import ALONE, Tokens, choose_trunks
from evomerge.evaluate.python_task import Helper
from evomerge.evaluate.requests import Requests
from evomerge.evaluate.taskfile import reason
from evomerge.evaluate.tasks import FEWSHOT_SEED, Item, Task
from evomerge.evaluate.time_limit import try_tokenizer
from evomerge.evaluate.token_budget import LEAST, token_budget
from evomerge.evaluate.workload import ItemRequests, Workload, join_workloads

Trunks = dict[Tokens, KeysValues]
"""The keys and values of the trunks that one candidate has computed; they are wrong for every other candidate."""


class Engine:
    """Scores one live model.  Tokenisation is that of lm-eval's HFLM, whose methods are called.

    model: a causal language model of transformers; any model, if there are only Python tasks.
    tokenizer: its tokenizer; None only if there are only Python tasks.
    batch_tokens: padded tokens per forward; `auto` is what the device holds.  It is halved for the rest of the run
        when the memory does not suffice.
    log: gets one line for everything that the model cannot do.
    language: whether there are tasks that ask a language model.
    open_processor: opens the model's processor, for Python tasks that want it; None gives them the tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int | Literal["auto"],
        log: Callable[[str], None] = lambda text: None,
        language: bool = True,
        open_processor: Callable[[], Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.log = log
        self.open_processor = open_processor
        self.batch_tokens = token_budget(batch_tokens, model) if language else LEAST
        self.capabilities = probe(model, self.vocabulary, log) if language else NONE
        self.unpacked: set[str] = set()  # tasks whose rows are longer than the model's window

    # --- What a language model has ---

    @cached_property
    def lm(self) -> Any:
        """lm-eval's HFLM on the model.  EvomergeError if its tokenizer takes too long."""
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=1, softmax_dtype="float32")
        try_tokenizer(lm.tok_encode)
        return lm

    @cached_property
    def requests(self) -> Requests:
        """Builds the requests of items."""
        return Requests(self.lm)

    @cached_property
    def vocabulary(self) -> int:
        """The number of rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def stops(self) -> Stops:
        """Where a generated answer ends."""
        end = {self.lm.eot_token_id, *as_list(getattr(self.model.generation_config, "eos_token_id", None))}
        return Stops(self.tokenizer, self.vocabulary, {int(t) for t in end if t is not None})

    # --- What Python tasks may ask for ---

    @cached_property
    def processor(self) -> Any:
        """transformers' processor in the model's folder: of images, sound and text, or the tokenizer alone."""
        return self.tokenizer if self.open_processor is None else self.open_processor()

    def helper(self, kind: Helper) -> Any:
        """The tokenizer or the processor.  EvomergeError if the model has none that can be opened."""
        found = getattr(self, kind)
        if found is None:
            raise EvomergeError(f"a Python task asks for the {kind}, and the base model has none that can be opened")
        return found

    # --- Items ---

    def prepare(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        """Build prompts, token ids and batches of a task's items; see `workload`."""
        work = self.workload(task, items, everything)
        self.plan(work)
        return work

    def workload(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        """Build prompts and token ids of a task's items, without batches.

        everything: all of the task's metrics and the gold answer's log-likelihood; else only the objective.

        EvomergeError if an item has an empty answer or does not fit the model, if the task's templates, choices or
        examples do not fit its documents, or if they take too long or too much memory.
        """
        if task.is_python:
            return Workload(task, [ItemRequests(item, [], [], [], [], None, 0) for item in items], complete=True)
        task.lm.set_fewshot_seed(FEWSHOT_SEED)  # before each call: lm-eval draws examples one after another
        objective = task.own.get(task.objective)
        only_gold = not everything and objective is not None and objective.needs == "gold"
        try:
            with without_panics():
                asked = self.asked(task, items, only_gold, everything or only_gold)
        except EvomergeError:
            raise
        except MemoryError:
            raise  # of a limit from outside, which the command line names
        except Exception as error:  # a template, a choice, an index: each fails in its own way
            raise EvomergeError(
                f"task {task.name}: no requests can be built of its items ({type(error).__name__}: {reason(error)}); "
                "do the templates fit the documents?"
            ) from error
        return Workload(task, asked, complete=not only_gold)

    def asked(self, task: Task, items: Sequence[Item], only_gold: bool, with_gold: bool) -> list[ItemRequests]:
        """What the model is asked about each item, see `Requests.of_item`.  EvomergeError if one takes too much."""
        found = []
        with within_bounds(f"task {task.name}: the requests of an item") as again:
            for item in items:
                again()
                found.append(self.requests.of_item(task, item, only_gold, with_gold))
        return found

    def join(self, works: Sequence[Workload]) -> Workload:
        """Workloads of single tasks as one, with its batches."""
        whole = join_workloads(works)
        self.plan(whole)
        return whole

    def in_chunks(self, works: Sequence[Workload], chunks: Sequence[Sequence[Sequence[int]]]) -> list[Workload]:
        """Workloads of tasks as one planned workload for each chunk of items; all tasks of a chunk share batches.

        chunks: for each chunk and each task, the indices of its items.  Trunks are chosen for the items of all chunks
        together, so that a candidate which keeps its `Trunks` from chunk to chunk computes each of them once.
        """
        joined = [
            join_workloads([work.pick(where) for work, where in zip(works, chunk, strict=True) if len(where)])
            for chunk in chunks
        ]
        if self.capabilities.trunks:
            rows = [row.leaf for work in works for row in work.rows]
            prompts = [prompt.leaf for work in works for prompt in work.prompts]
            shared = [*choose_trunks(rows), *choose_trunks(prompts, ALONE)]
            for work in joined:
                work.shared = shared
        for work in joined:
            self.plan(work)
        return joined

    def plan(self, work: Workload) -> None:
        """Make the batches of a workload for the present token budget."""
        work.budget = self.batch_tokens
        for part in work.by_task:
            part.calls = part.task.lm.blocks(len(part.items)) if part.task.is_python else []
        if not work.asks:
            return
        too_long = [part for part in work.by_task if part.asks and not self.capabilities.reaches(part.longest)]
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
        """`score` for each task of a workload.

        trunks: the trunks that the same candidate computed for other chunks; new ones are added.

        NotFiniteScore if a log-likelihood is NaN or infinite.  When the device runs out of memory, the token budget is
        halved for the rest of the run and the workload is scored from its beginning.
        """
        done, planned = clock.batches.done, work.steps
        while True:
            if work.budget != self.batch_tokens:
                self.plan(work)
            clock.batches.total += clock.batches.done - done + work.steps - planned
            done, planned = clock.batches.done, work.steps
            try:
                return self.score_planned(work, clock, trunks)
            except torch.OutOfMemoryError:
                if self.batch_tokens <= LEAST:
                    raise
            self.batch_tokens = max(LEAST, self.batch_tokens // 2)
            self.log(f"note: out of memory; from now on {self.batch_tokens} tokens a batch")
            free_memory(self.model.device)

    def score_planned(self, work: Workload, clock: Clock, trunks: Trunks | None) -> list[ItemMetrics]:
        """Run the batches of a workload and compute the metrics of each task."""
        extras = {m.extra for part in work.by_task for m in computed(part.task) if m.extra}
        lls = score_batches(self.model, work.batches, len(work.rows), clock, trunks, extras) if work.rows else []
        texts = self.texts(work, clock, trunks) if work.prompts else []
        called = {part.task.name: self.called(part, clock) for part in work.by_task if part.task.is_python}
        with clock.time("score"):
            return [called.get(own[0].task.name) or task_metrics(*own) for own in shared_out(work.by_task, lls, texts)]

    def called(self, work: Workload, clock: Clock) -> ItemMetrics:
        """The numbers of a Python task's function.  TaskCodeFailed if it does not give them."""
        values: list[float] = []
        docs = [asked.item.doc for asked in work.items]
        for places in work.calls:
            clock.check()
            which = f"items {places.start + 1} to {places.stop} of {len(docs)}"
            with clock.time("forward"), forwards_of(self.model, clock.counts):
                values += work.task.lm.score(self.model, docs[places.start : places.stop], self.helper, which)
            clock.batches.add()
        return {work.task.metric: values}

    def texts(self, work: Workload, clock: Clock, trunks: Trunks | None) -> list[str]:
        """The generated text of every prompt."""
        if self.capabilities.steps:
            count = len(work.prompts)
            tokens = generate(self.model, work.generations, count, self.stops, clock, work.packs, trunks)
            with clock.time("score"):
                return [self.text(t, p.until) for t, p in zip(tokens, work.prompts, strict=True)]
        clock.check()
        with clock.time("forward"), forwards_of(self.model, clock.counts):
            asked = [i for a in work.items for i in a.instances if i.request_type == "generate_until"]
            found = list(self.lm.generate_until(asked, disable_tqdm=True))
        clock.batches.add(len(work.generations))
        return found

    def text(self, tokens: list[int], until: Sequence[str]) -> str:
        """Generated tokens as text, cut at the first stop string."""
        from lm_eval.models.utils import postprocess_generated_text

        if tokens and tokens[-1] in self.stops.end_tokens:
            tokens = tokens[:-1]
        text: str = self.lm.tok_decode(tokens)
        return str(postprocess_generated_text(text, list(until), None))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
