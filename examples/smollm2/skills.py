"""The four skills that the specialists learn, split into what is trained on and what is asked.

    python examples/smollm2/skills.py evals/smollm2     # writes <skill>.jsonl, 300 items each

Everything is generated from seeds: nothing is downloaded, and the same call gives the same items everywhere.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import dates_and_times
import german_numbers
import shell_commands
import word_problems
from item import Item

SKILLS: dict[str, Callable[[Random], Item]] = {
    "math": word_problems.exercise,
    "shell": shell_commands.exercise,
    "denum": german_numbers.exercise,
    "calendar": dates_and_times.exercise,
}
EVALUATION, VALIDATION = 300, 100


def distinct(skill: str, seed: str) -> Iterator[Item]:
    """Endless items of a skill, no prompt twice; `seed` may be any text."""
    random, seen = Random(f"{skill} {seed}"), set[str]()
    while True:
        item = SKILLS[skill](random)
        if item.prompt not in seen:
            seen.add(item.prompt)
            yield item


def held_out(skill: str) -> tuple[list[Item], list[Item]]:
    """The evaluation items (what the jsonl files carry) and the validation items; training sees neither."""
    items = distinct(skill, "held out")
    return [next(items) for _ in range(EVALUATION)], [next(items) for _ in range(VALIDATION)]


def training(skill: str, seed: int) -> Iterator[Item]:
    """Endless training items, drawn with replacement (number words are few), never with a held-out prompt."""
    evaluation, validation = held_out(skill)
    forbidden = {item.prompt for item in evaluation + validation}
    random = Random(f"{skill} training {seed}")
    while True:
        item = SKILLS[skill](random)
        if item.prompt not in forbidden:
            yield item


def json_line(item: Item) -> str:
    fields = {"prompt": item.prompt, "target": item.target, "answer": item.answer}
    chosen = {"choices": item.choices} if item.choices else {}
    return json.dumps(fields | chosen, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the evaluation items of all skills as jsonl files.")
    parser.add_argument("out", type=Path, help="folder for <skill>.jsonl, beside the lm-eval YAMLs")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        evaluation, _ = held_out(skill)
        path = out / f"{skill}.jsonl"
        path.write_text("".join(map(json_line, evaluation)), encoding="utf-8")
        print(f"{path}: {len(evaluation)} items, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
