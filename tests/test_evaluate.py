"""Scores are those of lm-eval, items are dealt to the same splits every time, and task files run no code unasked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval_tasks import metrics, write_task
from models import VOCABULARY, write_llama

from evomerge.config.tasks import SplitsConfig, TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Batches, Clock
from evomerge.evaluate.deal import deal
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.item_values import scores_of
from evomerge.evaluate.loglikelihood import NotFiniteScore, score_batches
from evomerge.evaluate.metrics import Extra
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.standalone import TaskResult, evaluate_model
from evomerge.evaluate.tasks import Item, Split, Task, items_of
from evomerge.evaluate.workload import Workload

PROMPTS = [f"{a}{b}+{b}=" for a in "abcd" for b in "ef123"]  # 20 of them
TINY = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_choice(folder: Path, name: str, choices: list[str], **content: Any) -> Path:
    docs = [{"prompt": p, "choices": choices[k % 3 :] + choices[: k % 3], "gold": k % 2} for k, p in enumerate(PROMPTS)]
    ask = {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    return write_task(folder, name, docs, output_type="multiple_choice", **ask, **content)


def write_generation(folder: Path, name: str, docs: list[dict[str, Any]], until: list[str], **content: Any) -> Path:
    return write_task(
        folder,
        name,
        docs,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": until, "do_sample": False, "max_gen_toks": 8},
        metric_list=metrics("exact_match"),
        **content,
    )


def open_task(path: Path, **config: Any) -> Task:
    (task,) = open_tasks([TaskConfig(task=str(path), **config)])
    return task


# Models


def tiny_model(kind: str, folder: Path) -> Any:
    """A random two-layer model in float32 with 64 positions; weights large enough that answers differ."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    if kind == "gpt2":
        config: Any = GPT2Config(**TINY, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen2Config(**TINY, **sizes, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Any:
    return tiny_model("llama", llama_folder)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: str, count: int = 8) -> str:
    """Greedy decoding in its plainest form."""
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


# The same numbers as lm-eval


@dataclass
class Comparison:
    """The results of evomerge and of lm-eval for the same tasks and model."""

    tasks: dict[str, Task]
    ours: dict[str, TaskResult]
    work: dict[str, Workload]
    theirs: dict[str, Any]
    outputs: list[str]
    until: list[str]

    def samples(self, task: str, filter_name: str) -> list[dict[str, Any]]:
        """lm-eval's records of one task, in the data's order."""
        records = [s for s in self.theirs["samples"][task] if s["filter"] == filter_name]
        return sorted(records, key=lambda s: s["doc_id"])


def write_all(folder: Path, model: Any, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Every kind of task.  Returns the model's greedy answers and stop strings that occur in some of them."""
    outputs = [greedy(model, tokenizer, p) for p in PROMPTS]
    until = [stop for stop in (outputs[0][4:6], outputs[7][3:4], "?=?") if stop]
    docs = []
    for k, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        stopped = min((output.split(stop)[0] for stop in until), key=len)
        docs.append({"prompt": prompt, "answer": (stopped if k % 2 else "abc") or "b"})
    filters = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "letter", "filter": [{"function": "regex", "regex_pattern": "([a-u])"}, {"function": "take_first"}]},
    ]
    asked = [{"prompt": f"{a}{a}+{a}=", "choices": ["ab", "c"], "gold": 0} for a in "ghijk"]
    answered = [{"prompt": f"{a}{a}+{a}=", "answer": a * 2} for a in "ghijk"]
    write_choice(folder, "long_choices", [" ab", "c", " defg. hi"], metric_list=metrics("acc", "acc_norm"))
    write_choice(folder, "one_token", ["a", "b", "3"], metric_list=metrics("acc", "brier_score"))
    write_choice(folder, "delimited", ["a", "bcd", "3"], target_delimiter=" ", metric_list=metrics("acc"))
    shots = {"training_split": "train", "fewshot_split": "train", "num_fewshot": 2}
    write_choice(
        folder, "shots_choice", [" ab", "c", "de"], metric_list=metrics("acc", "acc_norm"), train=asked, **shots
    )
    write_generation(folder, "generation", docs, until, filter_list=filters)
    write_generation(folder, "shots_generation", docs, ["\n"], train=answered, **shots)
    ask = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"}
    likely = [
        {"prompt": prompt, "answer": (output[:1] if k % 2 else "abc") or "a"}
        for k, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True))
    ]
    write_task(folder, "answer", likely, output_type="loglikelihood", **ask, metric_list=metrics("perplexity", "acc"))
    texts = [{"text": "abc. def?\n12+3=" * n} for n in (1, 3, 5, 9, 20)]  # 15 to 300 tokens; the model takes 64
    write_task(
        folder,
        "rolling",
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )
    return outputs, until


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, tokenizer: Any
) -> Comparison:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = tiny_model(request.param, llama_folder)
    folder = tmp_path_factory.mktemp(request.param)
    outputs, until = write_all(folder, model, tokenizer)
    tasks = open_tasks(TaskConfig(task=str(file)) for file in sorted(folder.glob("*.yaml")))
    ours = evaluate_model(model, tokenizer, tasks, 256, None, Clock())
    engine = Engine(model, tokenizer, 256)
    work = {}
    for task in tasks:
        work[task.name] = engine.prepare(task, items_of(task, task.lm.eval_docs), everything=True)
        engine.score(work[task.name], Clock())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval reads data files from where it stands
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32"),
            tasks=[task.name for task in tasks],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    return Comparison({t.name: t for t in tasks}, {r.task: r for r in ours}, work, theirs, outputs, until)


EVERY_METRIC = [
    ("long_choices", "acc", "none"),
    ("long_choices", "acc_norm", "none"),
    ("one_token", "acc", "none"),
    ("delimited", "acc", "none"),
    ("shots_choice", "acc", "none"),
    ("shots_choice", "acc_norm", "none"),
    ("generation", "exact_match", "whole"),
    ("generation", "exact_match", "letter"),
    ("shots_generation", "exact_match", "none"),
    ("answer", "acc", "none"),
]


@pytest.mark.parametrize(("task", "metric", "filter_name"), EVERY_METRIC)
def test_accuracies_are_lm_evals_item_by_item(compared: Comparison, task: str, metric: str, filter_name: str) -> None:
    name = metric if compared.tasks[task].filters[0] == filter_name else f"{metric},{filter_name}"
    assert compared.ours[task].raw[name] == [s[metric] for s in compared.samples(task, filter_name)]
    assert compared.ours[task].metrics[name] == compared.theirs["results"][task][f"{metric},{filter_name}"]


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("one_token", "brier_score"),
        ("answer", "perplexity"),
        ("rolling", "word_perplexity"),
        ("rolling", "byte_perplexity"),
        ("rolling", "bits_per_byte"),
    ],
)
def test_perplexities_and_brier_scores_are_lm_evals(compared: Comparison, task: str, metric: str) -> None:
    expected = compared.theirs["results"][task][f"{metric},none"]
    assert compared.ours[task].metrics[metric] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["long_choices", "one_token", "delimited", "shots_choice", "answer"])
def test_every_choices_log_likelihood_is_lm_evals(compared: Comparison, task: str) -> None:
    for asked, sample in zip(compared.work[task].items, compared.samples(task, "none"), strict=True):
        assert asked.instances[0].doc == sample["doc"]
        for instance, (theirs,) in zip(asked.instances, sample["resps"], strict=True):
            ours, is_greedy = instance.resps[0]
            assert ours == pytest.approx(theirs[0], abs=1e-4)
            assert is_greedy == theirs[1]


def test_log_likelihoods_of_texts_longer_than_the_model_are_lm_evals(compared: Comparison) -> None:
    for asked, sample in zip(compared.work["rolling"].items, compared.samples("rolling", "none"), strict=True):
        assert asked.instances[0].resps[0] == pytest.approx(sample["resps"][0][0], abs=1e-4, rel=1e-6)


@pytest.mark.parametrize(("task", "filter_name"), [("generation", "whole"), ("shots_generation", "none")])
def test_generated_texts_are_lm_evals(compared: Comparison, task: str, filter_name: str) -> None:
    ours = [asked.instances[0].resps[0] for asked in compared.work[task].items]
    assert ours == [sample["resps"][0][0] for sample in compared.samples(task, filter_name)]


def test_the_comparison_is_not_about_nothing(compared: Comparison) -> None:
    """Some answers match and some do not; some are cut by a stop string and some reach the limit."""
    for task, metric, _ in EVERY_METRIC[:2]:
        assert 0 < compared.ours[task].metrics[metric] < 1
    assert 0.25 <= compared.ours["generation"].metrics["exact_match"] < 1
    stopped = [any(stop in output for stop in compared.until) for output in compared.outputs]
    assert 0 < sum(stopped) < len(stopped)


def test_few_shot_prompts_are_the_same_however_often_a_task_is_prepared(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """lm-eval draws examples in turn from one generator: the second time it would draw others."""
    task = with_train(tmp_path, list(range(100, 130)), num_fewshot=2)
    items = items_of(task, task.lm.eval_docs)
    engine = Engine(llama, tokenizer, 256)
    once, again = (engine.prepare(task, items, everything=True).items for _ in range(2))
    assert [a.instances[0].args for a in once] == [a.instances[0].args for a in again]


def test_few_shot_prompts_hold_two_examples(compared: Comparison) -> None:
    prompt = compared.work["shots_generation"].items[0].instances[0].args[0]
    assert prompt.count("+") == 3
    assert prompt == compared.samples("shots_generation", "none")[0]["arguments"][0][0]


# The smooth metrics


@torch.inference_mode()
def plain_logprob(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """log p(answer | context), token by token, without batches or padding."""
    start = tokenizer(context, add_special_tokens=False).input_ids
    tokens = tokenizer(context + answer, add_special_tokens=False).input_ids
    assert tokens[: len(start)] == start
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[k - 1, tokens[k]]) for k in range(len(start), len(tokens)))


@pytest.fixture
def generation_task(tmp_path: Path) -> Path:
    docs = [{"prompt": p, "answer": "abcd"[: 1 + k % 4], "best": "21"} for k, p in enumerate(PROMPTS)]
    return write_generation(tmp_path, "generation", docs, ["\n"], target_delimiter=" ")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(None, " {answer}"), ("{{best}}", " {best}"), ("\n{{best}}", "\n{best}"), ("{{answer}}.", " {answer}.")],
)
def test_the_gold_answers_log_probability_is_a_plain_forwards(
    llama: Any, tokenizer: Any, generation_task: Path, gold: str | None, answer: str
) -> None:
    task = open_task(generation_task, gold=gold, objective="gold_logprob")
    (result,) = evaluate_model(llama, tokenizer, [task], 128, None, Clock())
    docs = list(task.lm.eval_docs)
    expected = [plain_logprob(llama, tokenizer, d["prompt"], answer.format(**d)) for d in docs]
    assert result.raw["gold_logprob"] == pytest.approx(expected, abs=1e-4)
    assert result.raw["gold_prob"] == pytest.approx([torch.tensor(e).exp().item() for e in expected], rel=1e-3)


def test_the_values_of_the_gold_answers_tokens_are_a_plain_forwards(
    llama: Any, tokenizer: Any, generation_task: Path
) -> None:
    """In rows of several sequences and behind a trunk too: token by token, in the order of the answer."""
    task = open_task(generation_task, gold="{{best}}{{answer}}", objective="token_entropy")
    engine = Engine(llama, tokenizer, 128)
    work = engine.prepare(task, items_of(task, task.docs), everything=False)
    extras: set[Extra] = {"margins", "entropies"}
    found = score_batches(llama, work.batches, len(work.rows), Clock(), None, extras)
    assert len({row.scored for row in work.rows}) > 1
    for row, score in zip(work.rows, found, strict=True):
        with torch.inference_mode():
            logits = llama(torch.tensor([row.tokens[:-1]])).logits[0, -row.scored :]  # (T, V)
        targets = torch.tensor(row.tokens[-row.scored :])
        logprobs = logits.log_softmax(1)
        right = logits[range(row.scored), targets]
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        assert score.token_logprobs == pytest.approx(logprobs[range(row.scored), targets].tolist(), abs=1e-4)
        assert score.token_margins == pytest.approx((right - others).tolist(), abs=1e-4)
        assert score.token_entropies == pytest.approx((-(logprobs.exp() * logprobs).sum(1)).tolist(), abs=1e-4)
        assert score.logprob == pytest.approx(sum(score.token_logprobs), abs=1e-5)
        assert score.greedy == (min(score.token_margins) > 0)
    first = [-score.token_entropies[0] for score in found]
    assert scores_of(task, "token_entropy", engine.score(work, Clock())) == pytest.approx(first, abs=1e-6)
    assert not score_batches(llama, work.batches, len(work.rows), Clock())[0].token_margins


def test_the_objective_alone_gives_what_everything_gives(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    engine = Engine(llama, tokenizer, 256)
    task = open_task(write_choice(tmp_path, "long_choices", ["ab", "c", "defg"]), objective="gold_prob")
    items = items_of(task, task.lm.eval_docs)
    alone, everything = (engine.prepare(task, items, everything=e) for e in (False, True))
    assert all(asked.gold is not None for asked in (*alone.items, *everything.items))
    assert len(alone.rows) < len(everything.rows)
    scores = [scores_of(task, "gold_prob", engine.score(work, Clock())) for work in (alone, everything)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_scores_follow_the_weights_and_may_be_taken_again(tokenizer: Any, llama_folder: Path, tmp_path: Path) -> None:
    """lm-eval's filters keep an old answer unless they are told not to."""
    model = tiny_model("llama", llama_folder)
    docs = [{"prompt": p, "answer": greedy(model, tokenizer, p)} for p in PROMPTS]
    task = open_task(write_generation(tmp_path, "own", docs, ["\n\n"]))
    engine = Engine(model, tokenizer, 512)
    work = engine.prepare(task, items_of(task, task.lm.eval_docs), everything=True)

    def score() -> float:
        return sum(engine.score(work, Clock())["exact_match"])

    head = model.lm_head.weight.detach().clone()
    before = score()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert before > len(PROMPTS) / 2
    assert score() < before
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert score() == before


def shots_task(folder: Path) -> Task:
    """Forty items of multiple choice behind the same two examples."""
    docs = [{"prompt": f"{a}{b}+{b}=", "choices": ["ab", "c", "defg"], "gold": 0} for a in "abcdefgh" for b in "12345"]
    ask = {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    shots = {"training_split": "train", "fewshot_split": "train", "train": docs[:2], "num_fewshot": 2}
    first = {"fewshot_config": {"sampler": "first_n"}}
    return open_task(write_task(folder, "shots", docs, output_type="multiple_choice", **ask, **shots, **first))


def test_chunks_share_what_their_candidate_computed_and_score_the_same(
    llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    task = shots_task(tmp_path)
    items = items_of(task, task.docs)
    engine = Engine(llama, tokenizer, 256)
    whole = engine.score(engine.prepare(task, items, everything=True), Clock())
    trunks: dict[Any, Any] = {}
    found: dict[str, list[Any]] = {}
    asked = engine.workload(task, items, everything=True)
    for work in engine.in_chunks([asked], [[range(7)], [range(7, 25)], [range(25, 40)]]):
        assert {batch.trunk for batch in work.batches} <= set(work.shared or [])
        for metric, values in engine.score(work, Clock(), trunks).items():
            found.setdefault(metric, []).extend(values)
    assert len(trunks) == 1
    for metric, values in whole.items():
        np.testing.assert_allclose(flat(found[metric]), flat(values), rtol=1e-5, atol=1e-5)


def test_tasks_that_share_batches_score_as_they_do_alone(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_all(tmp_path, llama, tokenizer)
    tasks = open_tasks(TaskConfig(task=str(file)) for file in sorted(tmp_path.glob("*.yaml")))
    engine = Engine(llama, tokenizer, 512)
    alone, asked = [], []
    for task in tasks:
        items = items_of(task, task.lm.eval_docs)
        alone.append(engine.score(engine.prepare(task, items, everything=True), Clock()))
        asked.append(engine.workload(task, items, everything=True))
    orders = [np.random.default_rng(n).permutation(len(work.items)) for n, work in enumerate(asked)]
    chunks = [[order[k::2] for order in orders] for k in range(2)]
    for chunk, work in zip(chunks, engine.in_chunks(asked, chunks), strict=True):
        assert [part.task.name for part in work.by_task] == [t.name for t in tasks]
        for task, order, theirs, ours in zip(tasks, chunk, alone, engine.score_parts(work, Clock()), strict=True):
            assert ours.keys() == theirs.keys()
            for metric, values in ours.items():
                expected = flat([theirs[metric][i] for i in order])
                np.testing.assert_allclose(
                    flat(values), expected, rtol=1e-5, atol=1e-5, err_msg=f"{task.name} {metric}"
                )


def test_nothing_of_a_candidate_is_left_for_the_next(tokenizer: Any, llama_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", llama_folder)
    task = shots_task(tmp_path)
    items = items_of(task, task.docs)
    engine = Engine(model, tokenizer, 256)
    work = engine.prepare(task, items, everything=True)
    assert any(batch.trunk for batch in work.batches)
    before = engine.score(work, Clock())["gold_logprob"]
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(3)
    after = engine.score(work, Clock())["gold_logprob"]
    fresh = Engine(model, tokenizer, 256)
    assert after == fresh.score(fresh.prepare(task, items, everything=True), Clock())["gold_logprob"]
    assert after != before


def test_out_of_memory_halves_the_budget_for_good(
    llama_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error itself is CUDA's; here the model raises it where a forward has more than 300 tokens."""
    model = tiny_model("llama", llama_folder)
    log: list[str] = []
    engine = Engine(model, tokenizer, 4096, log.append)
    task = shots_task(tmp_path)
    work = engine.prepare(task, items_of(task, task.docs), everything=True)
    expected = engine.score(work, Clock())["gold_logprob"]
    forward = model.forward

    def small(inputs: Any, **options: Any) -> Any:
        if inputs.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(inputs, **options)

    monkeypatch.setattr(model, "forward", small)
    told: list[tuple[int, int]] = []
    batches = Batches(work.steps, lambda done, total: told.append((done, total)))
    assert engine.score(work, Clock(batches=batches))["gold_logprob"] == pytest.approx(expected, abs=1e-5)
    assert all(done <= total for done, total in told)
    assert batches.done == batches.total > 1, "batches that are computed again count again"
    assert engine.batch_tokens < 4096
    assert log[-1] == f"note: out of memory; from now on {engine.batch_tokens} tokens a batch"
    lines = len(log)
    engine.score(work, Clock())
    assert len(log) == lines


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_broken_weights_has_no_score(
    tokenizer: Any, llama_folder: Path, generation_task: Path, value: float
) -> None:
    model = tiny_model("llama", llama_folder)
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(NotFiniteScore):
        evaluate_model(model, tokenizer, [open_task(generation_task)], 256, None, Clock())


def flat(values: Any) -> list[float]:
    """Raw values, some of which are tuples or arrays, as one list of numbers."""
    if isinstance(values, (list, tuple, np.ndarray)):
        return [number for value in values for number in flat(value)]
    return [float(values)]


@pytest.mark.parametrize("budget", [1, 64, 333, 100_000])
def test_the_token_budget_changes_no_score(llama: Any, tokenizer: Any, tmp_path: Path, budget: int) -> None:
    write_all(tmp_path, llama, tokenizer)
    tasks = open_tasks(TaskConfig(task=str(f)) for f in sorted(tmp_path.glob("*.yaml")))
    one, other = (evaluate_model(llama, tokenizer, tasks, b, None, Clock()) for b in (200, budget))
    for expected, found in zip(one, other, strict=True):
        assert found.raw.keys() == expected.raw.keys()
        for metric in found.raw:
            np.testing.assert_allclose(flat(found.raw[metric]), flat(expected.raw[metric]), rtol=1e-5, atol=1e-5)


def test_the_work_may_be_interrupted_between_batches(llama: Any, tokenizer: Any, generation_task: Path) -> None:
    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        evaluate_model(llama, tokenizer, [open_task(generation_task)], 256, None, Clock(check))


def test_a_limit_takes_the_first_items(llama: Any, tokenizer: Any, generation_task: Path) -> None:
    task = open_task(generation_task)
    (some,) = evaluate_model(llama, tokenizer, [task], 256, 3, Clock())
    (all_of_them,) = evaluate_model(llama, tokenizer, [task], 256, None, Clock())
    assert (some.items, all_of_them.items) == (3, 20)
    assert some.raw["gold_logprob"] == pytest.approx(all_of_them.raw["gold_logprob"][:3], abs=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"choices": ["a", "b"], "gold": 5}, "gold answer 5 is not among its 2 choices"),
        ({"choices": ["a", ""], "gold": 0}, "an item has an empty answer"),
        ({"choices": ["a", "b" * 65], "gold": 0}, "an answer of 65 tokens is longer than the model's 64"),
    ],
)
def test_an_item_that_cannot_be_scored_is_said_with_its_task(
    llama: Any, tokenizer: Any, tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    docs = [{"prompt": "a", "choices": ["a", "b"], "gold": 0}, {"prompt": "a", **bad}]
    ask = {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    task = open_task(write_task(tmp_path, "broken", docs, output_type="multiple_choice", **ask))
    with pytest.raises(EvomergeError, match="task broken: ") as caught:
        evaluate_model(llama, tokenizer, [task], 256, None, Clock())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks 64 leaves no tokens for the prompt: the model takes 64"),
        ({"do_sample": True, "temperature": 0.7}, "asks for sampling"),
    ],
)
def test_generation_that_cannot_be_relied_on_is_refused(
    llama: Any, tokenizer: Any, generation_task: Path, options: dict[str, Any], message: str
) -> None:
    content = yaml.safe_load(generation_task.read_text())
    content["generation_kwargs"] |= options
    generation_task.write_text(yaml.safe_dump(content))
    with pytest.raises(EvomergeError, match=message):
        evaluate_model(llama, tokenizer, [open_task(generation_task)], 256, None, Clock())


# Dealing the items


def numbered(folder: Path, numbers: list[int], name: str = "numbers", **content: Any) -> Task:
    """A task whose documents are the given numbers."""
    folder.mkdir(exist_ok=True)
    docs = [{"prompt": f"{n}=", "answer": str(n)} for n in numbers]
    return open_task(write_generation(folder, name, docs, ["\n"], **content))


def dealt(task: Task, seed: int = 0, **splits: Any) -> dict[Split, list[str]]:
    """The answers in each split."""
    shares: dict[str, Any] = {"search": 0.4, "selection": 0.2, "holdout": 0.4}
    answers: Callable[[list[Item]], list[str]] = lambda items: [i.doc["answer"] for i in items]  # noqa: E731
    return {name: answers(items) for name, items in deal(task, SplitsConfig(**shares | splits), seed).items()}


def test_splits_are_disjoint_and_hold_everything_there_is(tmp_path: Path) -> None:
    splits = dealt(numbered(tmp_path, list(range(50))))
    assert {name: len(items) for name, items in splits.items()} == {"search": 20, "selection": 10, "holdout": 20}
    assert sorted((item for items in splits.values() for item in items), key=int) == [str(n) for n in range(50)]


def test_the_deal_follows_the_seed(tmp_path: Path) -> None:
    task = numbered(tmp_path, list(range(50)))
    assert dealt(task, 1) == dealt(task, 1)
    assert dealt(task, 1) != dealt(task, 2)


def test_the_deal_does_not_depend_on_the_order_of_the_data(tmp_path: Path) -> None:
    straight = dealt(numbered(tmp_path / "a", list(range(50))))
    turned = dealt(numbered(tmp_path / "b", list(range(50))[::-1]))
    assert {k: set(v) for k, v in straight.items()} == {k: set(v) for k, v in turned.items()}


def test_more_search_items_do_not_change_the_holdout(tmp_path: Path) -> None:
    task = numbered(tmp_path, list(range(50)))
    few, many = (dealt(task, search=n, selection=5, holdout=10) for n in (5, 30))
    assert few["holdout"] == many["holdout"]
    assert few["selection"] == many["selection"]
    assert set(few["search"]) < set(many["search"])


@pytest.mark.parametrize(
    ("count", "splits", "expected"),
    [
        (50, {"search": 7, "selection": 3, "holdout": 11}, (7, 3, 11)),
        (100, {"search": 0.29, "selection": 0.57, "holdout": 0.14}, (29, 57, 14)),  # 0.29 * 100 < 29 in floats
        (10, {"search": 0.33, "selection": 0.33, "holdout": 0.34}, (3, 3, 3)),
        (20, {"search": 0.5, "selection": 4, "holdout": 6}, (10, 4, 6)),
        (3, {"search": 1, "selection": 1, "holdout": 1}, (1, 1, 1)),
    ],
)
def test_counts_are_exact(tmp_path: Path, count: int, splits: dict[str, Any], expected: tuple[int, ...]) -> None:
    found = dealt(numbered(tmp_path, list(range(count))), **splits)
    assert tuple(len(found[name]) for name in ("search", "selection", "holdout")) == expected


def test_a_document_that_is_there_twice_is_dealt_once(tmp_path: Path) -> None:
    once = dealt(numbered(tmp_path / "a", list(range(20))))
    twice = dealt(numbered(tmp_path / "b", [*range(20), *range(10)]))
    assert twice == once


@pytest.mark.parametrize("splits", [{"search": 4, "selection": 4, "holdout": 4}, {"selection": 0.01}, {"search": 1000}])
def test_too_few_items_are_an_error_that_says_how_many_there_are(tmp_path: Path, splits: dict[str, Any]) -> None:
    with pytest.raises(EvomergeError, match="task numbers: has 10 items to deal, too few for the splits"):
        dealt(numbered(tmp_path, list(range(10))), **splits)


def with_train(folder: Path, train: list[int], **content: Any) -> Task:
    """Ten documents to test on, and some to train on; 50 to 54 are there to validate."""
    docs, validation = ([{"prompt": f"{n}=", "answer": str(n)} for n in numbers] for numbers in (train, range(50, 55)))
    splits = {"training_split": "train", "validation_split": "validation"}
    return numbered(folder, list(range(10)), train=docs, validation=validation, **splits, **content)


def test_a_split_of_the_tasks_own_is_taken_whole_and_the_rest_is_dealt(tmp_path: Path) -> None:
    found = dealt(with_train(tmp_path, [100, 101, 102]), search="train", selection=4, holdout=6)
    assert found["search"] == ["100", "101", "102"]
    assert sorted(found["selection"] + found["holdout"], key=int) == [str(n) for n in range(10)]


def test_an_item_in_two_of_the_tasks_own_splits_stays_in_the_holdout(tmp_path: Path) -> None:
    found = dealt(with_train(tmp_path, [3, 4, 100, 101]), search="train", selection="validation", holdout="test")
    assert found["holdout"] == [str(n) for n in range(10)]
    assert found["selection"] == ["50", "51", "52", "53", "54"]
    assert found["search"] == ["100", "101"]


def test_a_split_that_the_task_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="has no train split of its own"):
        dealt(numbered(tmp_path, list(range(10))), search="train")


def test_a_split_emptied_by_the_others_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="no item is left for the search split"):
        dealt(with_train(tmp_path, [3, 4]), search="train", selection="validation", holdout="test")


# Task files


def refusal(*configs: TaskConfig) -> str:
    with pytest.raises(EvomergeError) as caught:
        open_tasks(configs)
    return str(caught.value)


def refused(path: Path, **config: Any) -> str:
    return refusal(TaskConfig(task=str(path), **config))


@pytest.mark.parametrize("line", ["process_docs: !function code.run", "metric_list: [{metric: !function code.run}]"])
def test_a_task_file_with_a_python_function_is_refused_and_not_run(
    tmp_path: Path, generation_task: Path, line: str
) -> None:
    (tmp_path / "code.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nrun = print\n")
    plain = {k: v for k, v in yaml.safe_load(generation_task.read_text()).items() if k not in line}
    generation_task.write_text(yaml.safe_dump(plain) + line + "\n")
    assert "runs Python code (`!function`)" in refused(generation_task)
    assert not (tmp_path / "ran").exists()


def test_a_python_function_is_run_when_the_configuration_says_so(tmp_path: Path, generation_task: Path) -> None:
    (tmp_path / "code.py").write_text("def first_three(docs):\n    return docs.select(range(3))\n")
    generation_task.write_text(generation_task.read_text() + "process_docs: !function code.first_three\n")
    assert "set `allow_task_code: true` beside the task" in refused(generation_task)
    task = open_task(generation_task, allow_task_code=True)
    assert len(items_of(task, task.docs)) == 3


def test_a_limit_of_the_configuration_takes_the_first_documents(generation_task: Path) -> None:
    task = open_task(generation_task, limit=4)
    assert [i.doc["prompt"] for i in items_of(task, task.docs)] == PROMPTS[:4]
    assert sum(map(len, deal(task, SplitsConfig(search=2, selection=1, holdout=1), 0).values())) == 4


def test_a_python_function_in_an_included_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text("process_docs: !function code.run\n")
    (tmp_path / "task.yaml").write_text("task: x\ninclude: common.yaml\n")
    assert "common.yaml: runs Python code (`!function`)" in refused(tmp_path / "task.yaml")


def test_a_task_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: x\nclass: code.Task\n")
    assert "runs Python code (`class`)" in refused(tmp_path / "task.yaml")


@pytest.mark.parametrize("metric", [{"metric": "{folder}/evil"}, {"metric": "exact_match", "hf_evaluate": True}])
def test_a_metric_that_is_a_script_is_refused_and_not_run(
    tmp_path: Path, generation_task: Path, metric: dict[str, Any]
) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    metric = metric | {"metric": metric["metric"].format(folder=tmp_path)}
    content = yaml.safe_load(generation_task.read_text()) | {"metric_list": [metric]}
    generation_task.write_text(yaml.safe_dump(content))
    assert f"{generation_task}: " in refused(generation_task)
    assert not (tmp_path / "ran").exists()


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert "includes itself" in refused(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not YAML"),
        ("- a", "expected a mapping, found list"),
        ("output_type: generate_until", "has no `task:` name"),
        ("task: 3", "has no `task:` name"),
        ("task: x\ndate: 2024-02-31", "not YAML"),
        ("task: x\ndataset_kwargs: yes", "dataset_kwargs must be a mapping"),
        ("task: x\noutput_type: dance", "lm-eval cannot open this task"),
        ("task: x\ninclude: gone.yaml", "gone.yaml: no such file"),
    ],
)
def test_what_is_no_task_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "task.yaml").write_text(text)
    assert message in (said := refused(tmp_path / "task.yaml"))
    assert str(tmp_path) in said


def test_a_missing_task_file_or_data_file_is_named(tmp_path: Path, generation_task: Path) -> None:
    assert refused(tmp_path / "gone.yaml") == f"{tmp_path / 'gone.yaml'}: no such task file"
    (tmp_path / "generation.jsonl").unlink()
    message = f"{generation_task}: its data file is missing: {tmp_path / 'generation.jsonl'}"
    assert refused(generation_task) == message


def test_a_broken_line_of_the_data_is_named_by_its_number(tmp_path: Path, generation_task: Path) -> None:
    data = tmp_path / "generation.jsonl"
    lines = data.read_text().splitlines()
    lines[6] = lines[6][:-3]
    data.write_text("\n".join(lines))
    assert refused(generation_task).startswith(f"{data}: line 7 is not JSON (")


def test_line_separators_inside_a_text_do_not_end_a_line_of_data(tmp_path: Path) -> None:
    docs = [{"prompt": "a\u2028b\x85c=", "answer": "x"}, {"prompt": "d=", "answer": "y"}]
    task = open_task(write_generation(tmp_path, "separators", docs, ["\n"]))
    assert [doc["prompt"] for doc in task.lm.eval_docs] == ["a\u2028b\x85c=", "d="]


def test_data_files_count_from_the_folder_of_the_task_file(
    tmp_path: Path, generation_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(list(open_task(generation_task).lm.eval_docs)) == len(PROMPTS)


@pytest.mark.parametrize("key", ["metric", "objective"])
@pytest.mark.parametrize("name", ["accuracy", "exact_match,nofilter", "acc"])
def test_a_metric_that_the_task_does_not_have_is_refused_with_those_it_has(
    generation_task: Path, key: str, name: str
) -> None:
    names = "answer_logprob, answer_weakest, gold_logprob, gold_prob, token_entropy, bits_per_byte"
    known = f"smooth: {names}; others: exact_match"
    message = f"task generation: {key} {name!r} is not one of its metrics ({known})"
    assert refused(generation_task, **{key: name}) == message


def test_the_first_metric_is_the_default_and_the_objective_fits_it(generation_task: Path) -> None:
    task = open_task(generation_task)
    assert (task.metric, task.objective, task.auto) == ("exact_match", "answer_weakest", True)
    for name in ("gold_prob", "exact_match"):
        task = open_task(generation_task, objective=name)
        assert (task.metric, task.objective, task.auto) == ("exact_match", name, False)


def test_gold_is_for_generation_alone(tmp_path: Path) -> None:
    assert "`gold` is for generation" in refused(write_choice(tmp_path, "mc", ["a", "b", "c"]), gold="{{x}}")


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, generation_task: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy = write_generation(tmp_path / "copy", "generation", [{"prompt": "a", "answer": "b"}], ["\n"])
    configs = [TaskConfig(task=str(path)) for path in (generation_task, copy)]
    assert "two of them are called 'generation'" in refusal(*configs)


def test_the_number_of_shots_can_be_set_from_outside(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = with_train(tmp_path, [100, 101, 102])
    shots = open_task(tmp_path / "numbers.yaml", num_fewshot=2)
    engine = Engine(llama, tokenizer, 256)
    prompts = [engine.requests.instances(t, items_of(t, t.lm.eval_docs)[0])[0].args[0] for t in (task, shots)]
    assert [p.count("=") for p in prompts] == [1, 3]


def test_perplexities_count_as_the_lower_the_better(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_all(tmp_path, llama, tokenizer)
    task = open_task(tmp_path / "rolling.yaml")
    assert not task.higher_is_better("bits_per_byte")
    (result,) = evaluate_model(llama, tokenizer, [task], 256, None, Clock())
    scores = scores_of(task, "bits_per_byte", result.raw)
    assert all(score < 0 for score in scores)
    assert sum(scores) / len(scores) == pytest.approx(-result.metrics["bits_per_byte"], rel=0.1)


@pytest.mark.slow
def test_an_unknown_task_name_gets_near_names() -> None:
    message = refusal(TaskConfig(task="helaswag"))
    assert message.startswith("task 'helaswag': lm-eval has no task of that name; near it are hellaswag")
    assert "a path ending in .yaml" in message
