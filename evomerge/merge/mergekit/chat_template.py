"""From the `chat_template` of a mergekit file to the text of the template."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.files.read import read_json, read_text, refuse_stray_link

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template_text(wanted: str, folders: Iterable[Path]) -> str | None:
    """The text of a chat template.

    wanted: the text itself; `chatml`; or `auto`, the template that most of the models have.
    folders: of the models.

    Returns None if `auto` finds no template.  EvomergeError for any other name.
    """
    if wanted == "auto":
        found = Counter(text for text in map(template_in_folder, folders) if text)
        return found.most_common(1)[0][0] if found else None
    if wanted == "chatml":
        return CHATML
    if "{" not in wanted:
        raise EvomergeError(f"chat_template: {wanted!r} is not a template; give its text, auto or chatml")
    return wanted


def template_in_folder(folder: Path) -> str | None:
    """The chat template of the model in a folder; None if it has none."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        refuse_stray_link(folder / name)
    if os.path.isfile(file := folder / "chat_template.jinja"):
        return read_text(file).strip()
    if not os.path.isfile(file := folder / "tokenizer_config.json"):
        return None
    found = read_json(file).get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found.strip() if isinstance(found, str) else None
