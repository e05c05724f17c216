"""Make a small model that is no language model, two specialists of it and their items: python make.py KIND OUT

    classifier   BERT: is a text of made-up words positive or negative?
    embeddings   BERT without a head: which of six documents says the same as the query?
    translation  T5: translate three words

Each kind has two sets of words, `sea` and `sky`.  The base knows a little of both, each specialist one of them well.
OUT gets base/, sea/, sky/ and the items, sea.jsonl and sky.jsonl.  It takes seconds on one core.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scores import embed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = 12  # of each set in each of the two languages
SPECIAL = ["<pad>", "</s>", "<unk>"]
SETS = {"sea": range(WORDS), "sky": range(WORDS, 2 * WORDS)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BATCH, RATE = 32, 3e-3
Item = dict[str, Any]
Loss = Callable[[Any, list[Item], Any], torch.Tensor]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words a0, a1, ... of one language and b0, b1, ... of the other; a text ends with </s>."""
    words = [f"{language}{k}" for language in "ab" for k in range(2 * WORDS)]
    fast = Tokenizer(models.WordLevel({w: k for k, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def some_words(numbers: range, count: int, chance: random.Random) -> list[int]:
    return chance.sample(numbers, count)


def text(language: str, words: list[int]) -> str:
    return " ".join(f"{language}{k}" for k in words)


def classifier_item(numbers: range, chance: random.Random) -> Item:
    """Words with even numbers are good, the others bad; the greater part of five decides."""
    words = some_words(numbers, 5, chance)
    return {"text": text("a", words), "label": int(sum(k % 2 == 0 for k in words) > 2)}


def embeddings_item(numbers: range, chance: random.Random) -> Item:
    """The right document has the translations of the query's words, in another order."""
    words = some_words(numbers, 3, chance)
    documents = [some_words(numbers, 3, chance) for _ in range(5)]
    right = chance.randrange(6)
    documents.insert(right, chance.sample(words, 3))
    return {"query": text("a", words), "documents": [text("b", d) for d in documents], "right": right}


def translation_item(numbers: range, chance: random.Random) -> Item:
    """The translation has the same numbers."""
    words = some_words(numbers, 3, chance)
    return {"text": text("a", words), "translation": text("b", words)}


def classifier_loss(model: Any, items: list[Item], tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer([i["text"] for i in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    loss: torch.Tensor = model(**inputs, labels=torch.tensor([i["label"] for i in items])).loss
    return loss


def embeddings_loss(model: Any, items: list[Item], tokenizer: Any) -> torch.Tensor:
    queries = embed(model, [i["query"] for i in items], tokenizer)
    documents = embed(model, [i["documents"][i["right"]] for i in items], tokenizer)
    return torch.nn.functional.cross_entropy(10 * queries @ documents.T, torch.arange(len(items)))


def translation_loss(model: Any, items: list[Item], tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer([i["text"] for i in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = tokenizer([i["translation"] for i in items], return_tensors="pt").input_ids
    loss: torch.Tensor = model(**inputs, labels=labels).loss
    return loss


def bert(head: type) -> Callable[[int], Any]:
    return lambda rows: head(BertConfig(vocab_size=rows, max_position_embeddings=16, pad_token_id=0, **SIZES))


def t5(rows: int) -> Any:
    config = T5Config(
        vocab_size=rows, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


KINDS: dict[str, tuple[Callable[[int], Any], Callable[[range, random.Random], Item], Loss, int, int]] = {
    "classifier": (bert(BertForSequenceClassification), classifier_item, classifier_loss, 20, 60),
    "embeddings": (bert(BertModel), embeddings_item, embeddings_loss, 60, 120),
    "translation": (t5, translation_item, translation_loss, 250, 250),
}
"""Model, item, loss, steps of the base, steps of a specialist."""


def train(model: Any, sets: list[str], steps: int, kind: str, tokenizer: Any, seed: int) -> Any:
    """Train a copy of a model on fresh items of the given sets."""
    torch.manual_seed(seed)
    _, make_item, loss_of, _, _ = KINDS[kind]
    model, chance = copy.deepcopy(model).train(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(steps):
        items = [make_item(SETS[chance.choice(sets)], chance) for _ in range(BATCH)]
        optimizer.zero_grad()
        loss_of(model, items, tokenizer).backward()
        optimizer.step()
    return model.eval()


def make(kind: str, out: Path, items: int = 400) -> None:
    """Write base, specialists and items into a folder.  items: of each set."""
    make_model, make_item, _, first, more = KINDS[kind]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    base = train(make_model(len(tokenizer)), list(SETS), first, kind, tokenizer, 0)
    trained = {"base": base} | {
        name: train(base, [name], more, kind, tokenizer, seed) for seed, name in enumerate(SETS, 1)
    }
    for name, model in trained.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    for seed, (name, numbers) in enumerate(SETS.items(), 10):
        chance = random.Random(seed)
        lines = [json.dumps(make_item(numbers, chance)) + "\n" for _ in range(items)]
        (out / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make(arguments.kind, arguments.out)
