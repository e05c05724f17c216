"""All that is to be known of an accelerator, in one command of under nine minutes.

    python benchmarks/gpu.py --out results                        on the first CUDA device
    python benchmarks/gpu.py --out results --device cpu --small   a dry run of the same steps, in under a minute
    python benchmarks/gpu.py --out results --only bits bank       some of the steps

Each step is a process of its own with a time limit: what fails, hangs or breaks the device's state costs only itself.
Whole searches come first.  results.json and results.md in --out are written anew after every step; the exit
code is 1 if anything was wrong.  Missing packages are named at once; where one of them is needed, only the first step
runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL = 530.0  # seconds for everything
FIRST = "environment"  # the step without which no other runs
ROOMY = 45 << 30  # bytes that the largest models take, written


@dataclass(frozen=True)
class Step:
    """name: for --only.  function: `module.name` in `gpu_steps`.  limit: seconds.  title: for the table."""

    name: str
    function: str
    limit: float
    title: str


STEPS = [
    Step(FIRST, "machine.environment", 60, "Environment"),
    Step("search", "search.searched", 110, "A search, and trials repeated"),
    Step("workers", "search.killed", 120, "Two workers on one device, one killed"),
    Step("tests", "kernels.suite", 100, "The suite's own tests of an accelerator"),
    Step("generating", "generating.generating", 110, "Ways to generate"),
    Step("scoring", "scoring.scoring", 110, "Scoring and decoding"),
    Step("kernels", "kernels.compiled_kernels", 100, "One kernel of each kind"),
    Step("bits", "kernels.same_bits", 80, "Bits of the CPU"),
    Step("bank", "memory.capacities", 80, "The bank's bits and memory"),
    Step("large", "large.large", 150, "1.5B and 7B, four sources"),
    Step("floor", "floor.floor", 100, "Candidates against a copy of their bytes"),
]


@dataclass
class Results:
    """What came of the steps so far, in files."""

    out: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, step: Step, ending: str, seconds: float, rows: list[dict[str, Any]]) -> None:
        with self.lock:
            self.steps[step.name] = {"title": step.title, "ending": ending, "seconds": round(seconds, 1), "rows": rows}
            ordered = [self.steps[s.name] | {"name": s.name} for s in STEPS if s.name in self.steps]
            (self.out / "results.json").write_text(json.dumps(ordered, indent=1) + "\n")
            (self.out / "results.md").write_text("\n".join(table(ordered)) + "\n")

    @property
    def wrong(self) -> list[str]:
        """What went wrong, a line each."""
        found = [f"{n}: {s['ending']}" for n, s in self.steps.items() if s["ending"] != "done"]
        return found + [
            f"{n}: {row['name']}: {row['value']}"
            for n, s in self.steps.items()
            for row in s["rows"]
            if row["ok"] is False
        ]


def table(steps: list[dict[str, Any]]) -> list[str]:
    lines = ["| step | result | value | |", "|---|---|---|---|"]
    for step in steps:
        lines.append(f"| **{step['title']}** | {step['ending']} | {step['seconds']} s | |")
        for row in step["rows"]:
            verdict = {True: "ok", False: "WRONG", None: ""}[row["ok"]]
            value = "" if row["value"] is None else f"{row['value']} {row['unit']}".replace("|", "/")
            lines.append(f"| | {row['name']} | {value} | {verdict} |")
    return lines


def run_step(step: Step, args: argparse.Namespace, work: Path, left: Callable[[], float], results: Results) -> None:
    """Run a step in a process of its own, in a process group of its own, and add what came of it."""
    file = work / f"{step.name}.jsonl"
    started = time.monotonic()
    limit = min(step.limit, left())
    if limit < 5:
        results.add(step, "no time was left", 0.0, [])
        return
    print(f"== {step.title}", flush=True)
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--step",
        step.name,
        "--work",
        str(work),
        "--device",
        args.device,
    ]
    command += ["--family", str(args.family)] + (["--small"] if args.small else [])
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        ending = "done" if code == 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        ending = f"stopped after {limit:.0f} s"
    finally:
        stop(process)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    results.add(step, ending, time.monotonic() - started, rows)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started; its group has its number, and what is over is not harmed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def inside(args: argparse.Namespace) -> None:
    """The process of one step."""
    sys.path.insert(0, str(HERE))
    (step,) = (s for s in STEPS if s.name == args.step)
    import torch
    from gpu_steps.bench import Bench

    from evomerge.device import resolve_device, use

    device = resolve_device(args.device)
    use(device)
    module, _, name = step.function.partition(".")
    torch.manual_seed(0)
    bench = Bench(device, args.small, args.work, args.work / f"{step.name}.jsonl", args.family)
    getattr(import_module(f"gpu_steps.{module}"), name)(bench)


def begin_family(args: argparse.Namespace, work: Path) -> "subprocess.Popen[bytes] | None":
    """The tiny family: a given folder, else trained meanwhile; in a dry run its weights are random."""
    if args.family is not None:
        return None
    args.family = work / "family"
    if args.small:
        from gpu_steps.models import write_family

        write_family(args.family)
        return None
    script = HERE.parent / "examples" / "tiny" / "make.py"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # it trains on the CPU
    return subprocess.Popen([sys.executable, str(script), str(args.family)], start_new_session=True, env=hidden)


def work_folder() -> str | None:
    """Where models are written: memory, if the largest fit there twice over; None for the usual place."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOMY else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for results.json and results.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the least sizes, two steps at a time")
    parser.add_argument("--only", nargs="*", choices=[s.name for s in STEPS], help="these steps")
    parser.add_argument("--family", type=Path, help="what examples/tiny/make.py made (default: it is made)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    if args.step is not None:
        inside(args)
        return 0
    if args.out is None:
        parser.error("name a folder with --out")
    args.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE))
    from gpu_steps.packages import absent

    lacking = absent(HERE.parent / "pyproject.toml")
    if lacking:
        print(f"missing packages: {', '.join(lacking)}", flush=True)
    started = time.monotonic()
    results = Results(args.out)
    with tempfile.TemporaryDirectory(prefix="evomerge-gpu-", dir=None if args.small else work_folder()) as name:
        work = Path(name)
        steps = [s for s in STEPS if not args.only or s.name in args.only]
        if args.small:  # the longest first, so that both processes end at the same time
            steps.sort(key=lambda step: step.name not in (FIRST, "workers", "search", "scoring"))

        def run(step: Step) -> None:
            run_step(step, args, work, lambda: TOTAL - (time.monotonic() - started), results)

        family = None
        try:
            if steps[0].name == FIRST:
                run(steps.pop(0))
            if not results.wrong:
                family = begin_family(args, work)
                with ThreadPoolExecutor(2 if args.small else 1) as pool:
                    list(pool.map(run, steps))
        finally:
            if family is not None:
                stop(family)
    print((args.out / "results.md").read_text())
    for line in results.wrong:
        print(f"WRONG  {line}")
    print(f"{len(results.wrong)} wrong, {time.monotonic() - started:.0f} s")
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
