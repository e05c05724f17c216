"""What the machine is, and its ceilings: copies on the device, to the device, and products."""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from evomerge.merge.bank.memory import host_memory
from gpu_steps.bench import Bench

NEEDED = ["evomerge.cli", "evomerge.search.loop", "lm_eval.models.huggingface", "lm_eval.tasks", "cmaes", "triton"]
PACKAGES = "torch triton transformers huggingface_hub lm_eval optuna safetensors peft numpy".split()


def environment(bench: Bench) -> None:
    """Versions, memory and rates, and whether all that the other steps need can be imported."""
    for module in NEEDED:
        import_module(module)
    bench.report("machine", f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            bench.report(name, version(name))
        except PackageNotFoundError:
            bench.report(name, "absent")
    bench.report("host memory that may be used", host_memory() / 1e9, "GB")
    if bench.device.type == "cuda":
        found = torch.cuda.get_device_properties(bench.device)
        bench.report("device", f"{found.name}, capability {found.major}.{found.minor}, CUDA {torch.version.cuda}")
        free, total = torch.cuda.mem_get_info(bench.device)
        bench.report("device memory, free of all", f"{free / 1e9:.1f} of {total / 1e9:.1f}", "GB")
    size = 1 << (22 if bench.small else 31)
    there = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(there)
    bench.report("copy on the device, read and written", bench.rate(lambda: other.copy_(there), 2 * size / 1e9), "GB/s")
    host = torch.empty(size // 2, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    half = other[: size // 2]
    rate = bench.rate(lambda: half.copy_(host, non_blocking=True), size / 2 / 1e9)
    bench.report("from pinned memory to the device", rate, "GB/s")
    n = 256 if bench.small else 8192
    a = torch.randn(n, n, device=bench.device).bfloat16()
    bench.report("bfloat16 product", bench.rate(lambda: a @ a, 2 * n**3 / 1e12), "TFLOP/s")
