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
        return torch.device(wanted)
    except RuntimeError as error:
        raise EvomergeError(f"device: {wanted!r} is not a device ({str(error).splitlines()[0]})") from error
