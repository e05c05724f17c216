"""Kernels: whether each kind compiles, and whether their bits are the CPU's."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from merge import CASES, SOURCES, write_models
from stopwatch import timed

from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import materialise
from evomerge.merge.measure.scan import Scan
from evomerge.merge.methods import METHODS
from evomerge.sources.open_models import open_models
from gpu_steps.bench import Bench
from gpu_steps.models import outputs, recipe

BITS = ["task_arithmetic", "ties", "dare_ties", "della"]


def compiled_kernels(bench: Bench) -> None:
    """One kernel of each kind: the first candidate, which compiles, and the next."""
    folders = write_models(bench.work / "kernels", "tiny")
    compiled = bench.compiled()
    for method in [m for m in CASES if m in METHODS]:
        with bench.guarded(method):
            names = SOURCES[: METHODS[method].sources[1]]
            models = open_models(folders["base"], {n: folders[n] for n in names})
            bank = Bank(models, bench.device, compiled=compiled, mapped=False)
            out = outputs(bank, torch.bfloat16)
            first = timed(partial(materialise, recipe(method, folders, 0), bank, out), bench.device)
            again = timed(partial(materialise, recipe(method, folders, 1), bank, out), bench.device)
            bench.report(f"{method}, first and next candidate", f"{first:.3f}, {again:.4f}", "s", ok=True)


def same_bits(bench: Bench) -> None:
    """Four plans, fused and in pieces, float32 output, against the CPU in pieces; and what is measured of sources."""
    folders = write_models(bench.work / "bits", "tiny" if bench.small else "135m")
    models = open_models(folders["base"], {n: folders[n] for n in SOURCES})
    measured(bench, models)
    compiled = bench.compiled()
    for method in BITS:
        with bench.guarded(method):
            made = recipe(method, folders, 0)
            host = Bank(models, "cpu")
            wanted = outputs(host, torch.float32)
            started = time.perf_counter()
            materialise(made, host, wanted)
            bench.report(f"{method} on the CPU", time.perf_counter() - started, "s")
            for how, kernels in {"fused": compiled, "in pieces": None}.items():
                bank = Bank(models, bench.device, compiled=kernels, mapped=False)
                found = outputs(bank, torch.float32)
                materialise(made, bank, found)
                differing = sum(int((found[n].cpu() != wanted[n]).sum()) for n in wanted)
                bench.report(f"{method}, {how}: elements that differ", differing, ok=differing == 0)


def suite(bench: Bench) -> None:
    """The tests that need an accelerator; a dry run only finds them."""
    tests = Path(__file__).resolve().parents[2] / "tests" / "test_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0" if bench.small else "4", "-k", "accelerator", str(tests)]
    command += ["--collect-only"] if bench.small else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parents[1])
    print(done.stdout, done.stderr)
    last = ((done.stdout + done.stderr).strip().splitlines() or ["nothing"])[-1]
    bench.report("tests that need an accelerator", last, ok=done.returncode == 0)


def measured(bench: Bench, models) -> None:  # type: ignore[no-untyped-def]
    """Gram matrix, histogram, ranks and norms of the largest tensors, on the device and on the CPU."""
    host, bank = Bank(models, "cpu"), Bank(models, bench.device, mapped=False)
    names = sorted(host.names, key=lambda n: -host.base(n).numel())[:3] + host.names[-1:]
    scan = Scan()
    for name in names:
        with bench.guarded(f"measuring {name}"):
            found = []
            for place in (host, bank):
                x = [place.base(name), *(place.source(s, name) for s in SOURCES)]
                levels = scan.levels(x[0], x[1])
                k = max(1, x[0].numel() // 3)
                sizes = lambda p, x=x: (x[1].reshape(-1)[p].float() - x[0].reshape(-1)[p].float()).abs_()  # noqa: E731
                kth = scan.magnitudes(x[0], x[1]).kth(k, sizes, x[0].device)
                grams = scan.gram_matrix(x), scan.gram_matrix(x[1:], origin=x[0])
                norms = scan.l1(x[0], x[1], levels)
                found.append((grams[0].tobytes(), grams[1].tobytes(), kth, norms, levels.cpu().numpy().tobytes()))
            same = [a == b for a, b in zip(*found, strict=True)]
            bench.report(f"{name}: Gram matrices, threshold, norms, ranks", same, ok=all(same))
