"""The functions of three Python tasks: each gets the model and some items, and gives one number for each item."""

from typing import Any

import torch


def accuracy(model: Any, items: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """1 where the classifier gives an item's `text` its `label`."""
    inputs = tokenizer([i["text"] for i in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    found = model(**inputs.to(model.device)).logits.argmax(1).tolist()
    return [float(label == item["label"]) for label, item in zip(found, items, strict=True)]


def recall_at_1(model: Any, items: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """1 where the document nearest to an item's `query` is the `right` one of its `documents`."""
    return [recall(model, item, tokenizer, 1) for item in items]


def recall(model: Any, item: dict[str, Any], tokenizer: Any, k: int) -> float:
    """1 if the right document is among the k that are nearest to the query, else 0."""
    query, *documents = embed(model, [item["query"], *item["documents"]], tokenizer)
    nearest = (torch.stack(documents) @ query).topk(k).indices.tolist()
    return float(item["right"] in nearest)


def embed(model: Any, texts: list[str], tokenizer: Any) -> torch.Tensor:
    """The embeddings of texts, (texts, hidden size): the means of the last hidden states, of length 1."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def exact_match(model: Any, items: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """1 where the model writes the `translation` of an item's `text`."""
    inputs = tokenizer([i["text"] for i in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    written = model.generate(**inputs.to(model.device), max_new_tokens=8, do_sample=False, num_beams=1)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [float(t.strip() == i["translation"]) for t, i in zip(texts, items, strict=True)]
