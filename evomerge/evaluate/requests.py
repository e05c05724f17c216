"""From items to token ids: lm-eval's requests, tokenised and cut to the model's length as its HFLM does it."""

from typing import Any

from evomerge.errors import EvomergeError
from evomerge.evaluate.bounds import only_bounds
from evomerge.evaluate.generation import Prompt
from evomerge.evaluate.loglikelihood import Row
from evomerge.evaluate.tasks import Item, Task
from evomerge.evaluate.workload import ItemRequests

PROMPT_CHARACTERS = 16 << 20  # several times what the longest contexts hold


class Requests:
    """Builds the requests of items.

    lm: lm-eval's HFLM on the model, whose tokenisation is used.
    """

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def of_item(self, task: Task, item: Item, only_gold: bool, with_gold: bool) -> ItemRequests:
        """What the model is asked about one item.

        only_gold: only the gold answer's log-likelihood, not what lm-eval's metrics need.
        with_gold: of a generation item also the gold answer's log-likelihood; other kinds of task have it anyway.

        EvomergeError if an answer is empty or does not fit the model.
        """
        with only_bounds():  # not every request needs it, but metrics and the kept items do, without bounds
            task.lm.doc_to_target(item.doc)
        instances = self.instances(task, item)
        rows: list[Row] = []
        spans: list[range] = []
        prompts: list[Prompt] = []
        gold, answer = None, ""
        for instance in [] if only_gold and task.kind == "generate_until" else instances:
            if instance.request_type == "generate_until":
                prompts.append(self.prompt(task, *instance.args))
                continue
            if only_gold and task.kind == "multiple_choice" and instance.idx != gold_choice(task, item.doc):
                continue
            new = self.rows(task, instance)
            spans.append(range(len(rows), len(rows) + len(new)))
            rows += new
        if task.kind == "generate_until" and with_gold:
            gold = len(rows)
            context, answer = self.gold_pair(task, item, instances[0].args[0])
            rows.append(self.row(task, context, answer))
        elif task.kind == "multiple_choice":
            choice = gold_choice(task, item.doc)
            gold, answer = spans[0 if only_gold else choice].start, instances[choice].args[1]
        elif task.kind == "loglikelihood":
            gold, answer = spans[0].start, instances[0].args[1]
        return ItemRequests(item, instances, rows, spans, prompts, gold, len(answer.encode("utf-8")))

    def instances(self, task: Task, item: Item) -> list[Any]:
        """lm-eval's requests for one item.  EvomergeError if the tokenizer lacks the chat template that it needs, or
        the prompt is longer than any model reads."""
        template = None
        if task.chat:
            if self.lm.tokenizer.chat_template is None:
                raise EvomergeError(
                    f"task {task.name}: apply_chat_template is asked for, but the tokenizer has no chat template"
                )
            template = self.lm.apply_chat_template
        context = task.lm.fewshot_context(
            item.doc,
            num_fewshot=task.lm.config.num_fewshot or 0,
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat and task.multiturn,
            chat_template=template,
            gen_prefix=task.lm.doc_to_prefix(item.doc),
        )
        if len(context) > PROMPT_CHARACTERS:
            raise EvomergeError(
                f"task {task.name}: an item's prompt has {len(context):,} characters, more than {PROMPT_CHARACTERS:,}"
            )
        built = task.lm.construct_requests(
            doc=item.doc,
            ctx=context,
            metadata=(task.name, 0, 1),
            apply_chat_template=task.chat,
            chat_template=template,
        )
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
        """Tokens of context and continuation, split between them as lm-eval splits them."""
        if context == "":
            tokens = self.lm.tok_encode(continuation, add_special_tokens=False)
            prefix = self.lm.prefix_token_id
            if tokens and tokens[0] == prefix:
                return self.cut(task, tokens[:1], tokens[1:])
            return self.cut(task, [prefix], tokens)
        return self.cut(task, *self.lm._encode_pair(context, continuation))

    def cut(self, task: Task, context: list[int], continuation: list[int]) -> Row:
        """A row that is not longer than the model's input; a context that is too long loses its first tokens.

        EvomergeError if the continuation is empty or longer than the model's input.
        """
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
            return [self.row(task, *self.gold_pair(task, item, instances[0].args[0]))]
        if task.kind == "multiple_choice":
            gold = gold_choice(task, item.doc)
            instances = [i for i in instances if i.idx == gold]
        return [row for instance in instances for row in self.rows(task, instance)]

    def gold_pair(self, task: Task, item: Item, context: str) -> tuple[str, str]:
        """The prompt of a generation item and its gold answer as a continuation.

        The task's delimiter comes before the answer, except with a chat template, and before a `gold` template that
        starts with white space.
        """
        from lm_eval.utils import apply_template

        if task.gold is not None:
            answer = apply_template(task.gold, item.doc)
        else:
            answer = task.lm.doc_to_target(item.doc)
            if task.lm.config.doc_to_choice is not None:
                answer = task.lm.doc_to_choice(item.doc)[answer]
            answer = str(answer[0] if isinstance(answer, list) else answer)
        without = task.chat or (task.gold is not None and answer[:1].isspace())
        return context, ("" if without else task.lm.config.target_delimiter) + answer

    def prompt(self, task: Task, context: str, options: dict[str, Any]) -> Prompt:
        """A generation request with lm-eval's stop strings and limits.

        EvomergeError if it asks for sampling, has no stop strings or no prompt, or leaves the prompt no tokens.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options = normalize_gen_kwargs(options, self.lm.max_gen_toks)
        if options.get("do_sample") and options.get("temperature", 0) > 0:
            raise EvomergeError(f"task {task.name}: asks for sampling; only greedy generation gives scores to rely on")
        end = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        limit = int(options["max_gen_toks"])
        longest = self.lm.max_length - limit
        if longest <= 0:
            raise EvomergeError(
                f"task {task.name}: max_gen_toks {limit} leaves no tokens for the prompt: the model takes "
                f"{self.lm.max_length}"
            )
        stops = handle_stop_sequences(options.get("until"), eos=end)
        if limit < 1 or not all(isinstance(stop, str) for stop in stops):
            raise EvomergeError(
                f"task {task.name}: generation_kwargs needs stop strings in `until` and a `max_gen_toks` above 0"
            )
        tokens = self.lm.tok_encode(context)[-longest:]
        if not tokens:
            raise EvomergeError(f"task {task.name}: an item has an empty prompt, after which no text can be generated")
        return Prompt(tuple(tokens), tuple(stops), limit)


def gold_choice(task: Task, doc: dict[str, Any]) -> int:
    """The index of the gold choice of a multiple-choice document (the first, if it has several).

    EvomergeError if it is not one of the choices (lm-eval would count the item as wrong for every model).
    """
    gold = task.lm.doc_to_text(doc) if task.lm.multiple_input else task.lm.doc_to_target(doc)
    if isinstance(gold, list) and gold:
        gold = gold[0]
    choices = list(task.lm.doc_to_choice(doc))
    if gold in choices and not isinstance(gold, int):
        return choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise EvomergeError(f"task {task.name}: the gold answer {gold!r} is not among its {len(choices)} choices")
    return gold
