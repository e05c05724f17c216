"""What a trial's scoring costs beside lm-eval's HFLM, on the same live model with the same token budget.

    python benchmarks/evaluate.py runs/tiny/base
    python benchmarks/evaluate.py path/to/SmolLM2-135M --items 40 --repeats 3 --dtype bfloat16

HFLM is timed on requests that are built already, and its metrics are left out; the engine's time has everything from
token ids to item scores.  Every repetition times one after the other; the table has the ratio of their medians.
Tokens are counted against the prefix tree of the task's rows: those that no program can leave out.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from stopwatch import timed

from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskConfig
from evomerge.device import TORCH_DTYPES, resolve_device
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.prefix_plan import tree_tokens
from evomerge.evaluate.tasks import Task, items_of
from evomerge.evaluate.workload import Workload
from evomerge.merge.live import open_live_model
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models

WORDS = "the cat saw a small red house near our old river and they were glad of it when rain came down again".split()
LETTERS = "abcdefgh"  # for tokenizers of single characters
LOGITS = 16 << 30  # bytes
ROOM = 1024  # positions: the tiny family says 64, but its rotary positions do not end there


class Text:
    """Random text by number of tokens."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.letters = len(tokenizer) < 1000

    def of(self, tokens: int) -> str:
        if self.letters:
            return "".join(self.random.choices(LETTERS, k=tokens))
        return "".join(" " + w for w in self.random.choices(WORDS, k=tokens)).strip()  # a token each


def write_tasks(folder: Path, tokenizer: Any, items: int) -> None:
    """Four tasks: choices of several tokens, the same behind five examples, choices of one token, generation."""
    text = Text(tokenizer)
    gap = "" if text.letters else " "
    ends = ("=", "\n") if text.letters else ("\nAnswer:", "\n\n")
    single = list(LETTERS[:4]) if text.letters else ["cat", "house", "river", "rain"]

    def doc(tokens: int, choices: list[str]) -> dict[str, Any]:
        return {"prompt": text.of(tokens) + ends[0], "choices": choices, "gold": text.random.randrange(4)}

    def several() -> list[str]:
        return [text.of(text.random.randint(3, 6)) for _ in range(4)]

    docs = {
        "choice": [doc(text.random.randint(40, 60), several()) for _ in range(items)],
        "shots": [doc(text.random.randint(40, 60), several()) for _ in range(items)],
        "single": [doc(text.random.randint(40, 60), single) for _ in range(items)],
        "generation": [doc(text.random.randint(30, 60), ["x"] * 4) for _ in range(items)],
    }
    if text.letters:  # what the family was trained on, so that answers end
        for found in docs["generation"]:
            found["prompt"] = f"{text.random.choice(['rev', 'sort'])} {text.of(text.random.randint(5, 7))}="
    examples = [doc(95, several()) for _ in range(5)]
    for name, found in docs.items():
        data = {"test": f"{name}.jsonl"} | ({"train": "examples.jsonl"} if name == "shots" else {})
        content: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data},
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "gold",
            "target_delimiter": gap,
        }
        if name == "generation":
            content |= {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
            content["generation_kwargs"] = {"until": [ends[1], " the"], "do_sample": False, "max_gen_toks": 24}
            content["metric_list"] = [{"metric": "exact_match"}]
        else:
            content |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
            content["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
        if name == "shots":
            content |= {"fewshot_split": "train", "training_split": "train", "num_fewshot": 5}
            content |= {"fewshot_config": {"sampler": "first_n"}, "fewshot_delimiter": ends[1]}
            (folder / "examples.jsonl").write_text("".join(json.dumps(d) + "\n" for d in examples))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in found))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def tokens(work: Workload) -> tuple[float, float]:
    """Tokens computed over those of the prefix tree, without and with padding."""
    least = tree_tokens([row.tokens[:-1] for row in work.rows])
    trunks = sum(len(t) for t in {b.trunk for b in work.batches})
    padded = sum(b.inputs.numel() for b in work.batches)
    packed = sum(int((b.inputs != -1).sum()) for b in work.batches if b.positions is None)
    for batch in work.batches:
        if batch.ends is not None:
            place = torch.arange(batch.inputs.shape[1], device=batch.inputs.device)
            packed += int(((batch.ends > place + 1) | (batch.positions > 0)).sum())
    return (trunks + packed) / least, (trunks + padded) / least


def compare(engine: Engine, task: Task, repeats: int) -> list[str]:
    """One line of the table."""
    work = engine.prepare(task, items_of(task, task.docs), everything=False)
    instances = [i for asked in work.items for i in asked.instances]
    generates = task.kind == "generate_until"
    longest = (
        max(len(p.context) + p.limit for p in work.prompts) if generates else max(len(r.tokens) for r in work.rows)
    )
    room = LOGITS // (4 * engine.vocabulary)  # HFLM has the logits of all tokens, in float32
    engine.lm.batch_size_per_gpu = max(1, min(engine.batch_tokens, room) // longest)
    theirs = engine.lm.generate_until if generates else engine.lm.loglikelihood
    ours_s, theirs_s = [], []
    device = engine.model.device
    clock = Clock(device=device)
    for repeat in range(repeats + 1):
        clock = clock if repeat else Clock(device=device)
        ours = timed(lambda: engine.score(work, clock), device)  # noqa: B023
        other = timed(lambda: theirs(instances, disable_tqdm=True), device)
        if repeat:
            ours_s.append(ours)
            theirs_s.append(other)
        else:
            clock = Clock(device=device)
    outside = 1 - clock.seconds["forward"] / sum(ours_s)
    ratio = statistics.median(theirs_s) / statistics.median(ours_s)
    computed = ["", ""] if generates else [f"{x:.2f}" for x in tokens(work)]
    return [task.name, f"{ratio:.2f}x", *computed, f"{outside:.1%}", f"{statistics.median(ours_s):.2f}"]


def trial(folder: Path, tasks: list[Path], args: argparse.Namespace) -> list[str]:
    """Shares of a whole trial: the merge of two sources in the live model, then every task."""
    config = SearchConfig.model_validate(
        {
            "name": "benchmark",
            "base": str(folder),
            "sources": [{"name": n, "path": str(folder)} for n in ("one", "two")],
            "method": "linear",
            "space": {"weight": [0, 1]},
            "tasks": [{"task": str(t)} for t in tasks],
            "splits": {"search": args.items - 2, "selection": 1, "holdout": 1},
            "device": args.device,
            "dtype": args.dtype,
            "batch_tokens": args.batch_tokens,
        }
    )
    sources = [RecipeSource(name=n, path=str(folder), parameters={"weight": 0.5}) for n in ("one", "two")]
    recipe = Recipe(method="linear", base=Model(path=str(folder)), sources=sources)
    evaluator = Evaluator(config, open_config_models(config), open_task_set(config))
    extend(evaluator.model)
    evaluator.evaluate(recipe, "search", everything=False)
    lines = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        seconds = evaluator.evaluate(recipe, "search", everything=False).seconds
        whole = time.perf_counter() - start
        parts = ", ".join(f"{k} {v / whole:.1%}" for k, v in seconds.items())
        lines.append(f"outside forwards {1 - seconds['forward'] / whole:.1%} ({parts})")
    return lines


def extend(model: Any) -> None:
    model.config.max_position_embeddings = max(ROOM, model.config.max_position_embeddings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=list(TORCH_DTYPES))
    parser.add_argument("--only", nargs="*", help="names of tasks")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model, tokenizer = open_live_model(args.model, None, args.dtype, resolve_device(args.device), args.dtype)
    extend(model)
    print(f"{args.model}, {args.dtype} on {model.device}, {args.items} items, {args.batch_tokens} tokens a batch,")
    print(
        f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, tokenizer, args.items)
        files = [f for f in sorted(folder.glob("*.yaml")) if not args.only or f.stem in args.only]
        engine = Engine(model, tokenizer, args.batch_tokens, print)
        row = "| {:12} | {:>8} | {:>9} | {:>9} | {:>9} | {:>8} |".format
        print(row("task", "speed-up", "tokens", "padded", "outside", "seconds"))
        for task in open_tasks(TaskConfig(task=str(f), objective="metric") for f in files):
            print(row(*compare(engine, task, args.repeats)), flush=True)
        del engine
        for line in trial(args.model, files, args):
            print(line)


if __name__ == "__main__":
    main()
