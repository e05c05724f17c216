"""Make a small model that is no language model, two specialists of it and their items: python make.py KIND OUT

    classifier   BERT: is a text of made-up words positive or negative?
    embeddings   BERT without a head: which of six documents says the same as the query?
    translation  T5: translate three words

Each kind has two sets of words, `sea` and `sky`.  The base knows a little of both, each specialist one of them well.
OUT gets base/, sea/, sky/ and the items, sea.jsonl and sky.jsonl.  It takes some seconds on one core.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

SETS = "sea", "sky"
SPECIAL = ["<pad>", "</s>", "<unk>"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BATCH, RATE = 32, 1e-3
Item = dict[str, Any]
Loss = Callable[[Any, list[Item], Any], torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    model: makes one with random weights; gets the number of tokens.
    item: makes an item of the words with the given numbers.
    loss: of a model on items.
    words: of each set, in each of two languages.
    first, rate: steps and learning rate of the base.
    steps: of a specialist.
    """

    model: Callable[[int], Any]
    item: Callable[[range, random.Random], Item]
    loss: Loss
    words: int
    first: int
    rate: float
    steps: int

    def numbers(self, name: str) -> range:
        """The numbers of a set's words."""
        start = SETS.index(name) * self.words
        return range(start, start + self.words)


def make_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """Words a0, a1, ... of one language and b0, b1, ... of the other, `count` of each; a text ends with </s>."""
    words = [f"{language}{k}" for language in "ab" for k in range(count)]
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
    """The right document has the translations of the query's words, in another order; each other one two of them."""
    words = some_words(numbers, 3, chance)
    documents = [[*words[:2], *some_words(numbers, 1, chance)] for _ in range(5)]
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
    queries = embed(model, [i["query"] for i in items], tokenizer)  # (items, H)
    documents = embed(model, [d for i in items for d in i["documents"]], tokenizer).view(len(items), 6, -1)
    near = (documents @ queries[:, :, None])[:, :, 0]  # (items, documents)
    return torch.nn.functional.cross_entropy(10 * near, torch.tensor([i["right"] for i in items]))


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


KINDS = {
    "classifier": Kind(bert(BertForSequenceClassification), classifier_item, classifier_loss, 40, 12, 3e-3, 40),
    "embeddings": Kind(bert(BertModel), embeddings_item, embeddings_loss, 40, 25, 2e-3, 30),
    "translation": Kind(t5, translation_item, translation_loss, 12, 150, 5e-3, 80),
}


def train(model: Any, sets: Sequence[str], steps: int, rate: float, kind: Kind, tokenizer: Any, seed: int) -> Any:
    """Train a copy of a model on fresh items of the given sets."""
    torch.manual_seed(seed)
    model, chance = copy.deepcopy(model).train(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        items = [kind.item(kind.numbers(chance.choice(sets)), chance) for _ in range(BATCH)]
        optimizer.zero_grad()
        torch.autograd.backward(kind.loss(model, items, tokenizer))
        optimizer.step()
    return model.eval()


def make(kind: Kind, out: Path, items: int = 500) -> None:
    """Write base, specialists and items into a folder.  items: of each set."""
    tokenizer = make_tokenizer(2 * kind.words)
    torch.manual_seed(0)
    trained = {"base": train(kind.model(len(tokenizer)), SETS, kind.first, kind.rate, kind, tokenizer, 0)}
    for seed, name in enumerate(SETS, 1):
        trained[name] = train(trained["base"], [name], kind.steps, RATE, kind, tokenizer, seed)
    for name, model in trained.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    for seed, name in enumerate(SETS, 10):
        chance = random.Random(seed)
        lines = [json.dumps(kind.item(kind.numbers(name), chance)) + "\n" for _ in range(items)]
        (out / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make(KINDS[arguments.kind], arguments.out)
