"""The device that computes, and torch's types by their names in configurations."""

import torch
from torch import Tensor

from evomerge.errors import EvomergeError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(wanted: str) -> torch.device:
    """The device that a configuration names; `auto` is an accelerator if there is one, else the CPU.

    EvomergeError if this machine does not have the device.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EvomergeError(f"device: {wanted!r} was asked for, but torch finds no CUDA device here")
    if wanted.startswith("mps") and not torch.backends.mps.is_available():
        raise EvomergeError(f"device: {wanted!r} was asked for, but torch finds no Apple GPU here")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise EvomergeError(f"device: {wanted!r} is not a device ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise EvomergeError(f"device: {wanted!r} was asked for, but torch finds {count} here, the first is cuda:0")
    return device


def use(device: torch.device) -> None:
    """Make a device the current one of this thread: kernels run on the current device, wherever their operands are."""
    if device.type == "cuda" and device.index is not None:  # without an index it is the current device
        torch.cuda.set_device(device)


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its work; a clock that is read earlier measures only the time to start it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> None:
    """Give the memory back that torch keeps on a device for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def merging_device(device: torch.device) -> torch.device:
    """The device that merges for live models on a device.

    An Apple GPU has no float64, which measurements and derivatives are computed in; the CPU, whose memory it shares,
    merges for it.
    """
    return torch.device("cpu") if device.type == "mps" else device


def double(x: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU if that is an Apple GPU."""
    return x.to(merging_device(x.device)).double()
