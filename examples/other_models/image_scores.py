"""The function of a Python task that looks at images: it gets the model and some items, and gives a number for each."""

from typing import Any

from PIL import Image


def accuracy(model: Any, items: list[dict[str, Any]], processor: Any) -> list[float]:
    """1 where the classifier gives the image in the file `image` its `label`."""
    pixels = processor(images=[Image.open(i["image"]).convert("RGB") for i in items], return_tensors="pt")
    found = model(**pixels.to(model.device)).logits.argmax(1).tolist()
    return [float(label == item["label"]) for label, item in zip(found, items, strict=True)]
