"""Score the live model on prepared items: the model runs forwards, everything else was done before."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.config.schema import SMOOTH_METRICS
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.generation import GenerationBatch, Prompt, Stops, generate, plan_generation
from evomerge.evaluate.loglikelihood import Batch, Row, plan_batches, score_batches
from evomerge.evaluate.metrics import ItemMetrics, gold_choice, gold_metrics, item_score, lm_eval_metrics
from evomerge.evaluate.tasks import FEWSHOT_SEED, Item, Task


@dataclass
class Workload:
    """A task's items, ready to be scored any number of times.

    metrics: whether lm-eval's metrics are computed, or only the gold answer's log-probability.
    instances: per item, lm-eval's requests.  spans: per item, the range of its rows among all rows.
    gold: per item, the row of its gold answer, -1 if there is none.
    """

    task: Task
    items: list[Item]
    metrics: bool
    instances: list[list[Any]] = field(default_factory=list)
    spans: list[list[range]] = field(default_factory=list)
    gold: list[int] = field(default_factory=list)
    rows: int = 0
    batches: list[Batch] = field(default_factory=list)
    prompts: int = 0
    generations: list[GenerationBatch] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many batches an evaluation of this workload runs."""
        return len(self.batches) + len(self.generations)


class Engine:
    """Scores one live model.  Tokenisation follows lm-eval's HFLM, whose methods are used for it.

    model: a causal language model of transformers.  batch_tokens: padded tokens per forward.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
        end = {self.lm.eot_token_id, *as_list(getattr(model.generation_config, "eos_token_id", None))}
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.stops = Stops(tokenizer, vocabulary, {int(t) for t in end if t is not None})

    def prepare(self, task: Task, items: Sequence[Item], everything: bool) -> Workload:
        """Build prompts, token ids and batches of a task's items.

        everything: all of the task's metrics and the gold answer's log-probability; else only the objective.
        EvomergeError if an item has an empty answer or does not fit the model.
        """
        only_gold = not everything and task.objective in SMOOTH_METRICS
        work = Workload(task, list(items), metrics=not only_gold)
        task.lm.set_fewshot_seed(FEWSHOT_SEED)  # lm-eval draws examples in turn: start anew, or each prepare differs
        rows: list[Row] = []
        prompts: list[Prompt] = []
        for item in work.items:
            instances = self.instances(task, item)
            spans: list[range] = []
            gold = -1
            for instance in [] if only_gold and task.kind == "generate_until" else instances:
                if instance.request_type == "generate_until":
                    prompts.append(self.prompt(task, *instance.args))
                    continue
                if only_gold and task.kind == "multiple_choice" and instance.idx != gold_choice(task, item.doc):
                    continue
                new = self.rows(task, instance)
                spans.append(range(len(rows), len(rows) + len(new)))
                rows += new
            if task.kind == "generate_until" and (everything or only_gold):
                gold = len(rows)
                rows.append(self.gold_row(task, item, instances[0].args[0]))
            elif task.kind == "multiple_choice":
                gold = spans[0 if only_gold else gold_choice(task, item.doc)].start
            elif task.kind == "loglikelihood":
                gold = spans[0].start
            work.instances.append(instances)
            work.spans.append(spans)
            work.gold.append(gold)
        device = self.model.device
        work.rows, work.prompts = len(rows), len(prompts)
        work.batches = plan_batches(rows, self.batch_tokens, device) if rows else []
        pad = self.tokenizer.pad_token_id or 0
        work.generations = plan_generation(prompts, self.batch_tokens, pad, device) if prompts else []
        return work

    def instances(self, task: Task, item: Item) -> list[Any]:
        """lm-eval's requests for one item."""
        shots = task.lm.config.num_fewshot or 0
        context = task.lm.fewshot_context(item.doc, num_fewshot=shots, gen_prefix=task.lm.doc_to_prefix(item.doc))
        built = task.lm.construct_requests(doc=item.doc, ctx=context, metadata=(task.name, 0, 1))
        return list(built) if isinstance(built, list) else [built]

    def rows(self, task: Task, instance: Any) -> list[Row]:
        """The rows of one log-likelihood request; a rolling one is cut into windows of the model's length."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        if instance.request_type == "loglikelihood":
            return [self.row(task, *instance.args[:2])]
        windows = get_rolling_token_windows(
            token_list=self.lm.tok_encode(instance.args[0]),
            prefix_token=self.lm.prefix_token_id,
            max_seq_len=self.lm.max_length,
            context_len=1,
        )
        return [self.cut(task, *make_disjoint_window(w)) for w in windows]

    def row(self, task: Task, context: str, continuation: str) -> Row:
        """Tokens of context and continuation, split between them as lm-eval splits."""
        if context == "":
            tokens = self.lm.tok_encode(continuation, add_special_tokens=False)
            prefix = self.lm.prefix_token_id
            if tokens and tokens[0] == prefix:
                return self.cut(task, tokens[:1], tokens[1:])
            return self.cut(task, [prefix], tokens)
        return self.cut(task, *self.lm._encode_pair(context, continuation))

    def cut(self, task: Task, context: list[int], continuation: list[int]) -> Row:
        """A row no longer than the model takes; what is too much goes from the left."""
        if not continuation:
            raise EvomergeError(f"task {task.name}: an item has an empty answer, which has no log-likelihood")
        if len(continuation) > self.lm.max_length:
            raise EvomergeError(
                f"task {task.name}: an answer of {len(continuation)} tokens is longer than the model's "
                f"{self.lm.max_length}"
            )
        return Row(tuple((context + continuation)[-(self.lm.max_length + 1) :]), len(continuation))

    def gold_rows(self, task: Task, item: Item) -> list[Row]:
        """The rows whose log-likelihoods add up to that of an item's gold answer."""
        instances = self.instances(task, item)
        if task.kind == "generate_until":
            return [self.gold_row(task, item, instances[0].args[0])]
        if task.kind == "multiple_choice":
            gold = gold_choice(task, item.doc)
            instances = [i for i in instances if i.idx == gold]
        return [row for instance in instances for row in self.rows(task, instance)]

    def gold_row(self, task: Task, item: Item, context: str) -> Row:
        """The gold answer of a generation item as a continuation of its prompt.

        A `gold` template that starts with white space stands as it is; else the task's delimiter comes first.
        """
        from lm_eval.utils import apply_template

        if task.gold is not None:
            answer = apply_template(task.gold, item.doc)
        else:
            answer = task.lm.doc_to_target(item.doc)
            if task.lm.config.doc_to_choice is not None:
                answer = task.lm.doc_to_choice(item.doc)[answer]
            answer = str(answer[0] if isinstance(answer, list) else answer)
        delimiter = "" if task.gold is not None and answer[:1].isspace() else task.lm.config.target_delimiter
        return self.row(task, context, delimiter + answer)

    def prompt(self, task: Task, context: str, options: dict[str, Any]) -> Prompt:
        """A generation request with lm-eval's stops and limits.  EvomergeError if it asks for sampling."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = normalize_gen_kwargs(options, self.lm.max_gen_toks)
        if options.get("do_sample") and options.get("temperature", 0) > 0:
            raise EvomergeError(f"task {task.name}: asks for sampling; only greedy generation gives scores to rely on")
        end = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        limit = int(options["max_gen_toks"])
        room = self.lm.max_length - limit
        if room <= 0:
            raise EvomergeError(
                f"task {task.name}: max_gen_toks {limit} leaves no room in the model's {self.lm.max_length} tokens"
            )
        tokens = self.lm.tok_encode(context)[-room:]
        return Prompt(tuple(tokens), tuple(handle_stop_sequences(options.get("until"), eos=end)), limit)

    def score(self, work: Workload, clock: Clock) -> ItemMetrics:
        """Every metric of a workload for the model's present weights, one raw value per item.

        NotFiniteScore if a log-likelihood is NaN or infinite.
        """
        lls = score_batches(self.model, work.batches, work.rows, clock) if work.rows else []
        answers = generate(self.model, work.generations, work.prompts, self.stops, clock) if work.prompts else []
        with clock.time("score"):
            found: ItemMetrics = {}
            if work.metrics:
                texts = iter([self.text(tokens, work.generations) for tokens in answers])
                for spans, instances in zip(work.spans, work.instances, strict=True):
                    for k, instance in enumerate(instances):
                        instance.resps = [self.response(instance, spans, k, lls, texts)]
                found = lm_eval_metrics(work.task, work.items, work.instances)
            if all(g >= 0 for g in work.gold):
                found |= gold_metrics([lls[g][0] for g in work.gold])
        return found

    def response(self, instance: Any, spans: list[range], k: int, lls: list[tuple[float, bool]], texts: Any) -> Any:
        """What lm-eval's model would have answered to one request."""
        if instance.request_type == "generate_until":
            return next(texts)
        if instance.request_type == "loglikelihood_rolling":
            return sum(lls[r][0] for r in spans[k])
        return lls[spans[k].start]

    def text(self, tokens: list[int], batches: list[GenerationBatch]) -> str:
        """Generated tokens as text, cut at the first stop string."""
        from lm_eval.models.utils import postprocess_generated_text

        if tokens and tokens[-1] in self.stops.end_tokens:
            tokens = tokens[:-1]
        text: str = self.lm.tok_decode(tokens)
        return str(postprocess_generated_text(text, list(batches[0].until), None))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def scores_of(task: Task, metric: str, found: ItemMetrics) -> list[float]:
    """The item scores of one metric, the higher the better.  EvomergeError if it was not computed."""
    if metric not in found:
        raise EvomergeError(f"task {task.name}: the metric {metric!r} was not computed; there are {', '.join(found)}")
    return [item_score(task, metric, value) for value in found[metric]]
