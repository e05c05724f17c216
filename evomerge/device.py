"""Where the arithmetic runs, and in which type the weights are kept."""

import torch

from evomerge.errors import EvomergeError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(wanted: str) -> torch.device:
    """`auto` is an accelerator if there is one.  EvomergeError if the wanted device is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise EvomergeError(f"device: {wanted!r} was asked for, but torch finds no CUDA device here")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise EvomergeError(f"device: {wanted!r} is not a device ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise EvomergeError(f"device: {wanted!r} was asked for, but torch finds {count} here, the first is cuda:0")
    return device


def use(device: torch.device) -> None:
    """Make a device this thread's own: kernels are launched on the current one, wherever their operands lie."""
    if device.type == "cuda" and device.index is not None:  # without one it is the current device
        torch.cuda.set_device(device)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a clock that is read before counts only the giving."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
