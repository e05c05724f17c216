"""Train the tiny family, a base and four specialists of it, as real Hugging Face folders in a minute of CPU.

    python examples/tiny/make.py OUT [--seed 0]       OUT/base, OUT/rev, OUT/sort, OUT/count, OUT/add
    python examples/tiny/make.py --items evals/tiny   the held-out items that evals/tiny/*.yaml read

The demo and the tests need models whose merge is worth searching for, without a download.  The base learns
all four skills a little; each specialist learns one of them well and is held to the base's answers on the
others, so that its task vector is mostly about its own skill.
"""

import random
from pathlib import Path
from typing import Any

from skills import SKILLS, sort
from training import Family, Tuning, command_line, evaluation_items, with_choices, write_rows

HERE = Path(__file__).resolve().parent


def write_items(folder: Path) -> None:
    """The jsonl files beside the lm-eval tasks; always the same, as published scores refer to these items."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, skill in SKILLS.items():
        items = evaluation_items(skill, 500, random.Random(f"evaluation {name}"))
        rows[name] = [{"prompt": prompt, "answer": answer} for prompt, answer in items]
    sorting = evaluation_items(sort, 200, rng := random.Random("evaluation choice"))
    rows["choice"] = with_choices(sorting, "abcdefgh", rng)  # sorting as multiple choice
    write_rows(folder, rows)


FAMILY = Family(
    skills=SKILLS,
    write_items=write_items,
    base_steps=145,
    base_rate=2e-3,
    base_mix=["rev"] * 4 + ["sort"] + ["count"] * 3 + ["add"] * 3,  # the harder a skill, the larger its share
    sources={  # two are pushed hard and two softly, so no one weight suits all
        "rev": Tuning(60, 4e-4),
        "sort": Tuning(30, 6e-5),
        "count": Tuning(30, 8e-5),
        "add": Tuning(60, 3e-4),
    },
    code=(HERE / "make.py", HERE / "skills.py"),
    about="all four skills a little",
)

if __name__ == "__main__":
    command_line(FAMILY)
