"""The gradient of an objective is that of one plain forward for each request, and its scores are the engine's."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import metrics, write_task
from models import VOCABULARY, write_llama
from torch import Tensor

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate import gradient
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.formulas import FLOOR
from evomerge.evaluate.gradient import GradientMemory, backward
from evomerge.evaluate.item_values import scores_of
from evomerge.evaluate.loglikelihood import NotFiniteScore, Row
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.evaluate.workload import Workload

PROMPTS = [f"{a}{b}+{b}=" for a in "ab" for b in "ef12"]  # 8 of them
TINY = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

OBJECTIVES = {
    "choice": [
        "auto",
        "choice_logprob_norm",
        "entropy",
        "margin",
        "brier",
        "gold_logprob",
        "brier_score",
        "answer_logprob",
    ],
    "generation": ["auto", "answer_weakest", "entropy", "gold_logprob", "gold_prob", "bits_per_byte"],
    "answer": ["auto", "entropy", "gold_logprob", "perplexity"],
    "rolling": ["auto", "word_perplexity", "byte_perplexity"],
}


def write_tasks(folder: Path) -> None:
    """A task of each kind.  The longest text takes several windows of the model's 64 tokens."""
    choices = [
        {"prompt": p, "choices": [" ab", "c", " defg. hi", "cd"][: 3 + k % 2], "gold": k % 3}
        for k, p in enumerate(PROMPTS)
    ]
    answers = [{"prompt": p, "answer": "abc"[: 1 + k % 3]} for k, p in enumerate(PROMPTS)]
    texts = [{"text": "abc. def?\n12+3=" * n} for n in (1, 3, 9)]
    ask: dict[str, Any] = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"}
    write_task(
        folder,
        "choice",
        choices,
        output_type="multiple_choice",
        metric_list=metrics("acc", "brier_score"),
        **ask | {"doc_to_choice": "choices", "doc_to_target": "gold"},
    )
    write_task(
        folder,
        "generation",
        answers,
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        metric_list=metrics("exact_match"),
        **ask,
    )
    write_task(folder, "answer", answers, output_type="loglikelihood", metric_list=metrics("perplexity", "acc"), **ask)
    write_task(
        folder,
        "rolling",
        texts,
        output_type="loglikelihood_rolling",
        metric_list=metrics("bits_per_byte", "word_perplexity", "byte_perplexity"),
        **ask | {"doc_to_text": "", "doc_to_target": "{{text}}"},
    )


def make_model(kind: str, folder: Path) -> Any:
    """A random two-layer model in float64 with weights large enough that answers differ, frozen like the live model."""
    from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

    torch.manual_seed(0)
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif kind == "gpt2":  # tied head, learned positions, dropout
        model = AutoModelForCausalLM.from_config(
            GPT2Config(**TINY, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
        )
    else:  # a sliding window that some rows exceed
        config = MistralConfig(
            **TINY,
            **SIZES,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.5,
            sliding_window=12,
        )
        model = AutoModelForCausalLM.from_config(config)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backward")
    write_llama(folder / "llama")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def engines(folder: Path) -> dict[str, Engine]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    return {kind: Engine(make_model(kind, folder / "llama"), tokenizer, 256) for kind in ("llama", "gpt2", "mistral")}


def workload(engine: Engine, folder: Path, name: str, objective: str, everything: bool = False) -> Workload:
    (task,) = open_tasks([TaskConfig(task=str(folder / f"{name}.yaml"), objective=objective)])
    return engine.workload(task, items_of(task, task.docs), everything)


def weights_of(works: list[Workload]) -> dict[str, list[float]]:
    """A different weight for each item; one is 0 and some are negative."""
    return {work.task.name: [math.sin(k) for k in range(len(work.items))] for work in works}


def gradient_of(model: Any, compute: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What `compute` returns, and the gradients that it leaves in all parameters, which are frozen and free again."""
    model.requires_grad_(True)
    try:
        found = compute()
        return found, {name: p.grad.clone() for name, p in model.named_parameters()}
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None


def plain_logprobs(model: Any, row: Row) -> Tensor:
    """The log-probabilities of all tokens where those of a row are scored, (T, V), by one forward of its own."""
    logits = model(torch.tensor([row.tokens[:-1]]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[-row.scored :]


def plain_logprob(model: Any, row: Row) -> Tensor:
    """The log-likelihood of each scored token of a row, (T,)."""
    return plain_logprobs(model, row).gather(1, torch.tensor(row.tokens[-row.scored :])[:, None])[:, 0]


def plain_score(model: Any, work: Workload, place: int) -> Tensor:
    """The item score from plain forwards, by the formulas as papers write them."""
    asked = work.items[place]
    name, doc = work.task.objective, asked.item.doc
    if work.task.kind == "loglikelihood_rolling":
        total = torch.cat([plain_logprob(model, row) for row in asked.rows]).sum()
        count = len(doc["text"].split()) if name == "word_perplexity" else len(doc["text"].encode())
        return total / count / (math.log(2) if name == "bits_per_byte" else 1)
    if name in ("choice_logprob", "choice_logprob_norm", "choice_entropy", "margin", "brier", "brier_score"):
        gold = doc["gold"]
        lls = torch.stack([plain_logprob(model, asked.rows[span.start]).sum() for span in asked.spans])
        if name == "margin":
            return lls[gold] - max(lls[k] for k in range(len(lls)) if k != gold)
        if name == "choice_logprob_norm":
            lengths = torch.tensor([float(len(choice)) for choice in doc["choices"]])
            lls = lls / lengths * lengths.mean()
        p = lls.exp() / lls.exp().sum()
        if name.startswith("choice_logprob"):
            return ((p[gold] + math.exp(FLOOR)) / (1 + math.exp(FLOOR))).log()
        if name == "choice_entropy":
            return (p * p.log()).sum()
        return -torch.stack([(p[k] - float(k == gold)) ** 2 for k in range(len(lls))]).sum()
    assert asked.gold is not None
    row = asked.rows[asked.gold]
    logprob = plain_logprob(model, row)
    if name in ("answer_logprob", "answer_weakest"):
        values = ((logprob.exp() + math.exp(FLOOR)) / (1 + math.exp(FLOOR))).log()
        return values.mean() if name == "answer_logprob" else (values.mean() + values.min()) / 2
    if name == "token_entropy":
        first = plain_logprobs(model, row)[0]
        return (first.exp() * first).sum()
    if name == "bits_per_byte":
        return logprob.sum() / math.log(2) / len(doc["answer"].encode())
    return logprob.sum().exp() if name == "gold_prob" else logprob.sum()


def plain_loss(model: Any, works: list[Workload], weights: dict[str, list[float]]) -> None:
    terms = [
        -weight * plain_score(model, work, place)
        for work in works
        for place, weight in enumerate(weights[work.task.name])
    ]
    torch.stack(terms).sum().backward()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """tolerance: relative; norms and rotary positions are computed in float32 even in a float64 model."""
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name
        assert expected[name].norm() > 0, name


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("name", "objective"), [(n, o) for n, names in OBJECTIVES.items() for o in names])
def test_scores_are_the_engines(
    engines: dict[str, Engine], folder: Path, name: str, objective: str, everything: bool
) -> None:
    engine = engines["llama"]
    work = workload(engine, folder, name, objective, everything)
    found, _ = gradient_of(engine.model, lambda: backward(engine, [work], weights_of([work])))
    expected = scores_of(work.task, work.task.objective, engine.score(work, Clock()))
    assert found == {name: pytest.approx(expected, abs=1e-4, rel=1e-5)}
    assert len(set(expected)) > 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("packs", [True, False])
def test_the_gradient_is_that_of_plain_forwards(
    engines: dict[str, Engine], folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, packs: bool
) -> None:
    engine = engines[kind]
    monkeypatch.setattr(engine, "capabilities", replace(engine.capabilities, packs=packs and engine.capabilities.packs))
    assert engine.capabilities.packs == packs
    names = ("choice", "generation", "answer", "rolling")
    rounds = OBJECTIVES["choice"] if kind == "llama" else OBJECTIVES["choice"][:2]
    for round_, choice in enumerate(rounds):
        chosen = [choice, *(OBJECTIVES[name][round_ % len(OBJECTIVES[name])] for name in names[1:])]
        works = [workload(engine, folder, n, o) for n, o in zip(names, chosen, strict=True)]
        weights = weights_of(works)
        scores, found = gradient_of(engine.model, lambda w=works, by=weights: backward(engine, w, by))
        _, expected = gradient_of(engine.model, lambda w=works, by=weights: plain_loss(engine.model, w, by))
        assert_same(found, expected)
        for work in works:
            plain = [float(plain_score(engine.model, work, k)) for k in range(len(work.items))]
            assert scores[work.task.name] == pytest.approx(plain, rel=1e-6)


def test_batches_and_checkpoints_do_not_change_the_gradient(engines: dict[str, Engine], folder: Path) -> None:
    engine = engines["gpt2"]
    works = [workload(engine, folder, "choice", "margin"), workload(engine, folder, "rolling", "bits_per_byte")]
    weights = weights_of(works)
    counted = []
    results = []
    for memory in (GradientMemory(4096), GradientMemory(64), GradientMemory(1), GradientMemory(64, checkpointed=True)):
        steps: list[None] = []
        results.append(
            gradient_of(
                engine.model, lambda m=memory, s=steps: backward(engine, works, weights, lambda: s.append(None), m)
            )
        )
        counted.append(len(steps))
    assert counted[0] < counted[1] < counted[2] == 13  # 8 items and 5 windows
    for scores, found in results[1:]:
        assert_same(found, results[0][1])
        assert scores["choice"] == pytest.approx(results[0][0]["choice"], rel=1e-6)


def test_checkpoints_keep_fewer_activations(engines: dict[str, Engine], folder: Path) -> None:
    engine = engines["llama"]
    work = workload(engine, folder, "choice", "margin")

    def kept(checkpointed: bool) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            memory = GradientMemory(4096, checkpointed)
            gradient_of(engine.model, lambda: backward(engine, [work], weights_of([work]), memory=memory))
        return sum(saved.values())

    assert kept(True) < kept(False) / 2


def test_only_the_tensor_that_asks_for_a_gradient_gets_one(engines: dict[str, Engine], folder: Path) -> None:
    engine = engines["gpt2"]
    work = workload(engine, folder, "choice", "brier")
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    leaf = engine.model.transformer.h[1].mlp.c_fc.weight
    leaf.requires_grad_(True)
    forwards = {name: m.forward.__func__ for name, m in engine.model.named_modules()}
    try:
        backward(engine, [work], weights_of([work]), memory=GradientMemory(128, checkpointed=True))
        assert [n for n, p in engine.model.named_parameters() if p.grad is not None] == [
            "transformer.h.1.mlp.c_fc.weight"
        ]
    finally:
        leaf.requires_grad_(False)
        leaf.grad = None
    assert not any(m.training for m in engine.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in engine.model.modules())
    assert {name: m.forward.__func__ for name, m in engine.model.named_modules()} == forwards
    assert all(torch.equal(before[name], p) for name, p in engine.model.named_parameters())


def test_a_batch_that_does_not_fit_is_halved_and_everything_computed_again(
    engines: dict[str, Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["llama"]
    works = [workload(engine, folder, "choice", "margin"), workload(engine, folder, "rolling", "auto")]
    weights = weights_of(works)
    _, expected = gradient_of(engine.model, lambda: backward(engine, works, weights))
    memory, real, calls = GradientMemory(128), gradient.kept_logits, 0

    def limited(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1 and batch.inputs.numel() > 64:  # not the first one, so that there are gradients to forget
            raise torch.OutOfMemoryError
        return real(model, batch)

    monkeypatch.setattr(gradient, "kept_logits", limited)
    _, found = gradient_of(
        engine.model,
        lambda: backward(engine, works, weights, memory=memory, restart=lambda: engine.model.zero_grad()),
    )
    assert_same(found, expected)
    assert memory == GradientMemory(64)


def test_checkpoints_come_when_the_smallest_batch_does_not_fit() -> None:
    memory = GradientMemory(100)
    assert memory.shrink()
    assert memory == GradientMemory(64)
    assert memory.shrink()
    assert memory == GradientMemory(64, checkpointed=True)
    assert not memory.shrink()


def test_half_precision_has_a_float32_softmax(engines: dict[str, Engine], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16).eval().requires_grad_(False)
    engine = Engine(model, engines["llama"].tokenizer, 256)
    work = workload(engine, folder, "choice", "gold_logprob")
    found, _ = gradient_of(model, lambda: backward(engine, [work], weights_of([work])))
    expected = scores_of(work.task, "gold_logprob", engine.score(work, Clock()))
    error = max(abs(a - b) for a, b in zip(found["choice"], expected, strict=True))
    assert error < 0.02  # other batches round differently in the layers; a bfloat16 softmax errs by 0.01 a token more


def test_a_score_that_is_not_finite_leaves_no_gradient(folder: Path, engines: dict[str, Engine]) -> None:
    model = make_model("llama", folder / "llama")
    engine = Engine(model, engines["llama"].tokenizer, 256)
    work = workload(engine, folder, "choice", "margin")
    model.model.norm.weight.fill_(math.nan)
    model.requires_grad_(True)
    with pytest.raises(NotFiniteScore):
        backward(engine, [work], weights_of([work]))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "objective"), [("choice", "acc"), ("generation", "exact_match")])
def test_right_or_wrong_has_no_derivative(engines: dict[str, Engine], folder: Path, name: str, objective: str) -> None:
    work = workload(engines["llama"], folder, name, objective)
    with pytest.raises(
        EvomergeError, match=f"task {name}: the objective '{objective}' has no derivative.*gold_logprob"
    ):
        backward(engines["llama"], [work], weights_of([work]))
