"""How far each row of a tensor moved: the divergence of its softmax (`arcee_fusion`)."""

import torch
from torch import Tensor

from evomerge.merge.measure.sums import chunk_on, chunks, total


def divergences(source: Tensor, base: Tensor) -> Tensor:
    """KL(softmax source || softmax base) of each row over the last dimension, both plus 1e-8; (..., 1) float32.

    source, base: (..., E).  A scalar is a row of one element.  A divergence below 0 is a rounding error and becomes 0.
    """
    shape = (*base.shape[:-1], 1) if base.ndim else ()
    if base.numel() == 0:
        return torch.zeros(shape, device=base.device)
    width = base.shape[-1] if base.ndim else 1
    rows, base_rows = source.reshape(-1, width), base.reshape(-1, width)
    found = torch.zeros(rows.shape[0], device=base.device)
    for part in chunks(rows.shape[0], max(1, chunk_on(base.device) // width)):
        p = rows[part].double().softmax(-1) + 1e-8
        q = base_rows[part].double().softmax(-1) + 1e-8
        found[part] = total(p * (p / q).log()).clamp(min=0.0)
    return found.reshape(shape)
