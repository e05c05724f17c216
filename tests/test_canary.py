"""The canary finds broken models and lets healthy ones pass."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.evaluate.canary import (
    Broken,
    Signs,
    canary_prompts,
    check_signs,
    endless,
    measure_signs,
    normal_signs,
)

ROWS = 64


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=None, tie_word_embeddings=False, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENS = canary_prompts([range(1, 30), range(5, 45), range(9, 60, 2)], torch.device("cpu"))


def test_prompts_are_cut_to_one_length_from_the_left() -> None:
    assert TOKENS.shape == (3, 26)
    assert TOKENS[:, -1].tolist() == [29, 44, 59]


def test_a_healthy_model_passes_and_writes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "generate", None)  # it would fail if it were called
    found = measure_signs(model, TOKENS, None)
    check_signs(measure_signs(model, TOKENS, normal_signs([found])), normal_signs([found]))
    assert 0 < found.entropy < 5


def test_one_weight_that_is_not_finite_is_found(model: Any) -> None:
    model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(Broken, match="not finite"):
        measure_signs(model, TOKENS, None)


def test_a_collapsed_entropy_is_found(model: Any) -> None:
    normal = normal_signs([measure_signs(model, TOKENS, None)])
    model.lm_head.weight.mul_(200)
    with pytest.raises(Broken, match="entropy"):
        check_signs(measure_signs(model, TOKENS, normal), normal)


def test_an_endless_repetition_is_found(model: Any) -> None:
    normal = normal_signs([measure_signs(model, TOKENS, None)])
    model.model.norm.weight.zero_()  # all logits are equal, so that token 0 always comes next
    found = measure_signs(model, TOKENS, normal)
    assert found.repeats
    with pytest.raises(Broken, match="repeats itself"):
        check_signs(found, normal)


def test_what_the_parents_do_is_no_fault(model: Any) -> None:
    model.model.norm.weight.zero_()
    normal = normal_signs([measure_signs(model, TOKENS, None)])
    check_signs(measure_signs(model, TOKENS, normal), normal)


def test_without_parents_only_what_is_not_finite_is_broken() -> None:
    check_signs(Signs(0.0, 1.0, repeats=True), normal_signs([]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("aaaaaaaaaaaa", True), ("abcabcabcabc", True), ("abcdabcdabcd", True), ("abcdeabcdeab", False), ("aaaab", False)],
)
def test_a_repetition_is_one_unit_over_and_over(text: str, expected: bool) -> None:
    assert endless([ord(c) for c in text]) == expected
