"""Scoring and decoding beside lm-eval's HFLM, and the share of the device's peak that the forwards reach."""

import sys
import tempfile
from pathlib import Path

import torch
from evaluate import compare, extend, write_tasks
from merge import write_models
from stopwatch import timed

from evomerge.config.tasks import TaskConfig
from evomerge.evaluate.clock import Clock, Counts
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.merge.live import load_live_model
from evomerge.sources.tokenizer import open_tokenizer
from gpu_steps.bench import Bench
from gpu_steps.models import write_tokenizer


def engine_of(bench: Bench) -> Engine:
    """An engine on a model of random weights."""
    size = "tiny" if bench.small else "1.5b"
    folder = write_models(bench.work / f"scoring {bench.results.stem}", size, [], str(bench.device))["base"]
    write_tokenizer(folder)
    model = load_live_model(folder, torch.bfloat16, bench.device)
    extend(model)
    return Engine(model, open_tokenizer(folder), "auto", print)


def scoring(bench: Bench) -> None:
    """Choices, log-likelihoods and greedy generation."""
    names = ["choice", "generation"] if bench.small else ["choice", "shots", "single", "generation"]
    engine = engine_of(bench)
    bench.report("tokens of a batch", engine.batch_tokens)
    parameters = sum(p.numel() for p in engine.model.parameters())
    n = 256 if bench.small else 8192
    a = torch.randn(n, n, device=bench.device).bfloat16()
    peak = bench.rate(lambda: a @ a, 2 * n**3)
    with tempfile.TemporaryDirectory(dir=bench.work) as name:
        write_tasks(Path(name), engine.tokenizer, 4 if bench.small else 400)
        for task in open_tasks(TaskConfig(task=str(Path(name) / f"{n}.yaml"), objective="metric") for n in names):
            with bench.guarded(task.name):
                row = compare(engine, task, 1 if bench.small else 3)
                bench.report(f"{task.name}: times as fast as HFLM", row[1].rstrip("x"), ok=True)
                work = engine.prepare(task, items_of(task, task.docs), everything=False)
                counts = Counts()
                clock = Clock(counts=counts, device=bench.device)
                seconds = timed(lambda w=work, c=clock: engine.score(w, c), bench.device)
                bench.report(f"{task.name}: tokens a second", counts.tokens / seconds)
                share = 2 * parameters * counts.tokens / clock.seconds["forward"] / peak
                bench.report(f"{task.name}: share of the product's rate in forwards", share)
                print(f"  {clock.seconds}", file=sys.stderr)
