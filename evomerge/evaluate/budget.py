"""How many tokens one forward may have."""

from typing import Any, Literal

import torch

from evomerge.evaluate.loglikelihood import LOGITS, Plan, Row, kept_logits, plan_batches

ON_CPU = 4096  # more does not make a processor faster
LEAST, MOST = 64, 65536
TRIED = 1024  # tokens of the forward whose memory is measured
SHARE = 0.5  # of the free memory: blocks of unequal sizes leave gaps


@torch.inference_mode()
def token_budget(wanted: int | Literal["auto"], model: Any, vocabulary: int) -> int:
    """`auto` is what the accelerator's free memory holds, by the memory that one forward takes, as a power of two."""
    if wanted != "auto":
        return wanted
    if model.device.type != "cuda":
        return ON_CPU
    rows = [Row(tuple((k + t) % vocabulary for t in range(129)), 1) for k in range(TRIED // 128)]
    (batch,) = plan_batches(rows, Plan(TRIED, model.device, vocabulary, packs=False))
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    kept_logits(model, batch)
    taken = (torch.cuda.max_memory_allocated(model.device) - before) / TRIED  # bytes a token
    free = torch.cuda.mem_get_info(model.device)[0] - 4 * 4 * LOGITS  # logits in float32 and what is made of them
    most = max(LEAST, min(MOST, int(SHARE * free / max(1.0, taken))))
    return 1 << (most.bit_length() - 1)
