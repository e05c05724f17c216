"""How the folder of a merged model is loaded: the library, and the lines that a model card shows."""

from collections.abc import Mapping
from typing import Any

from evomerge.sources.architecture import is_language_model, is_multimodal

GENERATE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("Your prompt", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
LOAD = """```python
from {library} import {name}

model = {name}.from_pretrained("path/to/this/folder")
```"""
SEE = """```python
from transformers import AutoProcessor, {name}

model = {name}.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```"""
TENSORS = """```python
from safetensors.torch import load_file

tensors = load_file("path/to/this/folder/{weights}.safetensors")
```"""


def how_to_load(config: Mapping[str, Any], weights: str) -> tuple[dict[str, str], str]:
    """The first keys of a card's front matter, and the lines of Python that load a folder with this config.json.

    weights: what the names of the weight files begin with.
    """
    if not config:
        return {}, TENSORS.format(weights=weights)
    if is_language_model(config):
        return {"library_name": "transformers", "pipeline_tag": "text-generation"}, GENERATE
    name = class_name(config)
    library = "diffusers" if "_class_name" in config else "transformers"
    if not name:
        return {}, TENSORS.format(weights=weights)
    lines = SEE if is_multimodal(config, name) else LOAD
    return {"library_name": library}, lines.format(library=library, name=name)


def class_name(config: Mapping[str, Any]) -> str:
    """The class that loads a model with this config.json; empty if it cannot be told."""
    if is_language_model(config):
        return "AutoModelForCausalLM"
    named = config.get("architectures", [config.get("_class_name", "AutoModel")])
    name = str(named[0]) if isinstance(named, list) and named else ""
    return name if name.isidentifier() else ""  # the file may be a stranger's
