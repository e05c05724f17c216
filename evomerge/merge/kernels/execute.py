"""Execute a plan on one tensor.  A compiled kernel runs where there is one, else torch; the bits are the same."""

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.call import Call, call_of
from evomerge.merge.kernels.compiled import Compiled, fused_call
from evomerge.merge.kernels.elementwise import FISHER_FLOOR, FISHER_SCALE, FISHER_WEIGHT
from evomerge.merge.kernels.operands import Operands, in_row_order, number_tensor
from evomerge.merge.kernels.piecewise import piece_size, piecewise, piecewise_call
from evomerge.merge.methods.plan import Blend, Clip, Derived, FisherBlend, Plan, SliceBlend, SparseBlend


def execute(
    plan: Plan, out: Tensor, operands: Operands, compiled: Compiled | None = None, piece: int | None = None
) -> Tensor:
    """Write what `plan` makes of its operands to `out`.

    out: a contiguous tensor of the operands' shape, of any floating type.
    compiled: the compiled kernels, if there are.
    piece: elements that torch computes at a time; by default what suits the device.

    Returns the largest |out| as a float32 scalar on its device, NaN if any element is.
    """
    if out.numel() == 0:
        return torch.zeros((), device=out.device)
    piece = piece or piece_size(out.device)
    match plan:
        case Blend() | SparseBlend() | Derived():
            return run(call_of(plan, operands), out, compiled, piece)
        case SliceBlend():
            return slice_blend(plan, out, operands, piece)
        case Clip():
            return clip(plan, out, operands, piece)
        case FisherBlend():
            return fisher_blend(plan, out, operands, piece)


def run(call: Call, out: Tensor, compiled: Compiled | None, piece: int) -> Tensor:
    """Run a call of `blend` or `sparse_blend`: on CUDA by Triton, on the CPU fused, or piece by piece."""
    if compiled is not None and out.device.type == "cuda":
        return compiled.launcher.run([(out, call)])[0]
    fused = fused_call(call, out, compiled) if compiled is not None else None
    return piecewise_call(call, out, piece) if fused is None else fused


def slice_blend(plan: SliceBlend, out: Tensor, operands: Operands, piece: int) -> Tensor:
    """`blend` with coefficients that differ along one axis: the same kernel on runs of whole slices."""
    terms = list(zip(operands.sources, plan.sources, strict=True))
    if not plan.of_task_vectors and plan.base is not None:
        terms.insert(0, (operands.base, plan.base))
    # A vector is one slice; all other tensors become (S, elements of a slice).
    tensors = (out, operands.base, *(x for x, _ in terms))
    views = [x.reshape(1, -1) if x.ndim < 2 else x.movedim(plan.axis, 0) for x in tensors]
    target, origin, *sources = (v.flatten(1) if v.ndim > 2 else v for v in views)
    table = np.stack([c for _, c in terms]).astype(np.float32)
    coefficients = torch.from_numpy(table).to(out.device)[:, :, None]  # (N, S, 1)
    rows = max(1, piece // max(1, target.shape[1]))
    found = []
    for start in range(0, target.shape[0], rows):
        part = slice(start, start + rows)
        found.append(
            elementwise.blend(
                target[part],
                origin[part] if plan.of_task_vectors else None,
                [x[part] for x in sources],
                coefficients[:, part],
            )
        )
    return torch.stack(found).amax()


def clip(plan: Clip, out: Tensor, operands: Operands, piece: int) -> Tensor:
    """`elementwise.clip`, piece by piece."""
    limit = number_tensor([plan.limit], np.float32, out.device)
    flat, base, source = out.view(-1), operands.base.reshape(-1), operands.sources[0].reshape(-1)
    return piecewise(lambda p: elementwise.clip(flat[p], base[p], source[p], limit), out.numel(), piece)


def fisher_blend(plan: FisherBlend, out: Tensor, operands: Operands, piece: int) -> Tensor:
    """`elementwise.fisher_blend`, piece by piece; sources of weight 0 are not read."""
    used = [i for i, w in enumerate(plan.weights) if w != 0.0]
    if not used:
        return elementwise.store(out, operands.base)
    rows = {
        FISHER_WEIGHT: [plan.weights[i] for i in used],
        FISHER_SCALE: [plan.scales[i] for i in used],
        FISHER_FLOOR: [plan.floor] * len(used),
    }
    numbers = number_tensor(in_row_order(rows), np.float32, out.device).view(3, -1)
    flat, base = out.view(-1), operands.base.reshape(-1)
    sources = [operands.sources[i].reshape(-1) for i in used]
    fishers = [operands.planes[i].reshape(-1) for i in used]
    return piecewise(
        lambda p: elementwise.fisher_blend(flat[p], base[p], [x[p] for x in sources], [f[p] for f in fishers], numbers),
        out.numel(),
        piece,
    )
