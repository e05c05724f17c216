"""Measures what one job takes, in the worker that does it: time, forwards, tokens, memory, energy."""

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch

from evomerge import system
from evomerge.device import synchronise
from evomerge.evaluate.clock import Counts
from evomerge.search.budget.usage import Usage


class Meter:
    """Measures one job: `with Meter(counts, device) as meter: ...`, then `meter.used`.

    What was used before an error counts too.

    counts: the counter to which the job adds its forwards.
    device: that computes.
    """

    def __init__(self, counts: Counts, device: torch.device) -> None:
        self.counts = counts
        self.device = device
        self.used = Usage()

    def __enter__(self) -> "Meter":
        self.before = replace(self.counts)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.energy = energy_counter(self.device)
        self.started_at = self.energy()
        self.started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        synchronise(self.device)
        seconds = time.perf_counter() - self.started
        first, last = self.started_at, self.energy()
        self.used = Usage(
            seconds,
            seconds,
            seconds,
            self.counts.forwards - self.before.forwards,
            self.counts.tokens - self.before.tokens,
            self.counts.padded - self.before.padded,
            peak_memory(self.device),
            None if first is None or last is None else last - first,
        )


def peak_memory(device: torch.device) -> int:
    """The most bytes in use: of an accelerator since its peak was reset, else of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_memory()


Joules = Callable[[], float | None]
COUNTERS: dict[str, Joules] = {}


def energy_counter(device: torch.device) -> Joules:
    """A function that reads how many joules a device has used since its driver was loaded.

    It returns None where the device does not tell.  NVML counts the whole device, so each of two workers on one device
    counts the energy of both.  There is no energy of CPUs: their counters are those of the whole machine and need root.
    """
    if device.type != "cuda":
        return lambda: None
    if str(device) not in COUNTERS:
        COUNTERS[str(device)] = nvml_counter(device)
    return COUNTERS[str(device)]


def nvml_counter(device: torch.device) -> Joules:
    """The energy counter of a CUDA device: needs nvidia-ml-py and a device that has one (Volta and later)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # Not by number: CUDA_VISIBLE_DEVICES renumbers devices for torch, not for NVML.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # whatever goes wrong here, a search runs without its energy
        return lambda: None

    def joules() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError:
            return None

    return joules
