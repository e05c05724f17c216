"""Train the mixed family, a base and three sources of it, as real Hugging Face folders in a minute of CPU.

    python examples/mixed/make.py OUT [--seed 0]        OUT/base, OUT/both, OUT/add, OUT/next
    python examples/mixed/make.py --items evals/mixed   the held-out items that evals/mixed/*.yaml read

Its tasks are of different kinds: multiple choice (`count`), short answers (`add`), long answers (`next`).  The sources
are unequal: `both` is good at the first two, while `next` has learnt the third and forgotten some of the others.  A
long answer has seven times as many tokens as a short one, and hardly ever becomes right as a whole.  So the sum of its
log-probabilities has the most to gain by far, and its exact match the least.
"""

import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tiny"))

from mixed_skills import SKILLS  # noqa: E402
from training import Family, Tuning, command_line, evaluation_items, with_choices, write_rows  # noqa: E402


def write_items(folder: Path) -> None:
    """The jsonl files beside the lm-eval tasks; always the same, as published scores refer to these items."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, skill in SKILLS.items():
        items = evaluation_items(skill, 400, rng := random.Random(f"evaluation {name}"))
        if name == "count":
            rows[name] = with_choices(items, "01234", rng)
        else:
            rows[name] = [{"prompt": prompt, "answer": answer} for prompt, answer in items]
    write_rows(folder, rows)


FAMILY = Family(
    skills=SKILLS,
    write_items=write_items,
    base_steps=120,
    base_rate=2e-3,
    base_mix=["count"] * 3 + ["add"] * 5 + ["next"],
    sources={
        "both": Tuning(50, 4e-4, ("count", "add")),
        "add": Tuning(25, 2e-4),
        "next": Tuning(100, 1.2e-3, held=0.05),
    },
    code=(HERE / "make.py", HERE / "mixed_skills.py"),
    about="all three skills a little",
)

if __name__ == "__main__":
    command_line(FAMILY)
