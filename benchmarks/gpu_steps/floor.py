"""`benchmarks/merge.py`, whose lines are the results."""

import subprocess
import sys
from pathlib import Path

from merge import CASES

from gpu_steps.bench import Bench

SCRIPT = Path(__file__).resolve().parents[1] / "merge.py"


def floor(bench: Bench) -> None:
    """Candidates against a copy of the same bytes: SmolLM2-135M, eight layers of a 7B, and those streamed."""
    device = ["--device", str(bench.device), "--folder", str(bench.work)]
    if bench.small:
        lines(
            bench, "tiny", [*device, "--model", "tiny", "--methods", "linear", "ties", "--no-compiled", "--repeat", "2"]
        )
        return
    lines(bench, "135m", [*device, "--model", "135m", "--no-eager", "--repeat", "5"])
    few = ["--methods", "task_arithmetic", "ties", "dare_ties", "--no-eager", "--repeat", "5"]
    lines(bench, "7b", [*device, "--model", "7b", *few])
    lines(bench, "7b streamed", [*device, "--model", "7b", "--stream", *few])


def lines(bench: Bench, title: str, arguments: list[str]) -> None:
    """Run the benchmark; each line of its table is reported as it comes."""
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            method, _, rest = line.strip().partition(" ")
            if method in CASES:
                bench.report(f"{title}, {method}: times the floor, median, memory", " ".join(rest.split()), ok=True)
    if process.returncode:
        bench.report(title, f"ended with {process.returncode}", ok=False)
