"""The token budget: how many padded tokens one forward may have on this device."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from evomerge.evaluate.loglikelihood import LOGITS, Plan, Row, kept_logits, plan_batches
from evomerge.files.write import write_text

ON_CPU = 4096  # larger batches are not faster on a processor
LEAST, MOST = 64, 65536
TRIED = 1024  # tokens of the forward whose memory is measured
SHARE = 0.5  # the part of the free memory that is used: blocks of unequal sizes leave gaps


def token_budget(wanted: int | Literal["auto"], model: Any, reserved: int = 0, folder: Path | None = None) -> int:
    """The number of padded tokens per forward.

    wanted: a number, or `auto`: on an accelerator the greatest power of two whose forward fits into the free memory,
        by the memory that one measured forward takes; ON_CPU on a CPU.
    reserved: bytes of the free memory that are needed for something else.
    folder: where the measured number is kept, so that every worker of a run and every resume on the same kind of
        device makes the same batches, whose scores have the same bits.
    """
    if wanted != "auto":
        return wanted
    if model.device.type != "cuda":
        return ON_CPU
    file = None
    if folder is not None:
        kind = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(model.device))
        file = folder / f"batch-tokens-{kind}-{str(model.dtype).removeprefix('torch.')}.json"
        if (kept := kept_budget(file)) is not None:
            return kept
    bytes_a_token = measured_forward(model)
    free = torch.cuda.mem_get_info(model.device)[0]
    found = fitting_tokens(free - reserved, bytes_a_token)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found))
    return found


def fitting_tokens(free: int, bytes_a_token: float) -> int:
    """The number of tokens, a power of two, that fit into `free` bytes beside the logits.

    The logits take four float32 tensors of LOGITS elements: they themselves and what is computed from them.
    """
    left = free - 4 * 4 * LOGITS
    most = max(LEAST, min(MOST, int(SHARE * left / max(1.0, bytes_a_token))))
    return 1 << (most.bit_length() - 1)


def kept_budget(file: Path) -> int | None:
    """The number that a file holds; None if the file is absent or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if type(found) is int and LEAST <= found <= MOST else None


@torch.inference_mode()
def measured_forward(model: Any) -> float:
    """The bytes of device memory that a forward takes for each of its tokens."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rows = [Row(tuple((k + t) % vocabulary for t in range(129)), 1) for k in range(TRIED // 128)]
    (batch,) = plan_batches(rows, Plan(TRIED, model.device, vocabulary, packs=False))
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    kept_logits(model, batch)
    return (torch.cuda.max_memory_allocated(model.device) - before) / TRIED
