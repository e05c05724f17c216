"""Run kernels in torch, piece by piece: the reference of all others, and what runs where nothing is compiled."""

from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.call import Call
from evomerge.merge.kernels.random_masks import low_word, with_high_word

PIECE = 1 << 15  # elements for one thread: every operand stays in its cache, and below torch's threading grain
PIECE_ON_ACCELERATOR = 1 << 24  # there a launch costs more than a pass over memory


def piece_size(device: torch.device) -> int:
    """Elements of a piece.  A power of two, so that no piece lies on both sides of the 2^32-th element."""
    if device.type != "cpu":
        return PIECE_ON_ACCELERATOR
    threads = torch.get_num_threads()
    return PIECE if threads == 1 else 2 * PIECE << (threads - 1).bit_length()


def piecewise_call(call: Call, out: Tensor, piece: int) -> Tensor:
    """Write the result of a call to `out`, which is contiguous.

    Returns the largest |out| as a float32 scalar, NaN if any element is.
    """
    if not call.sources:
        return out.zero_().new_zeros((), dtype=torch.float32)
    if call.is_copy:
        return elementwise.store(out, call.sources[0])
    device, form = out.device, call.form
    flat, base = out.view(-1), None if call.base is None else call.base.reshape(-1)
    sources = [x.reshape(-1) for x in call.sources]
    numbers = call.number_rows(device)
    if form is None:
        return piecewise(
            lambda p: elementwise.blend(flat[p], None if base is None else base[p], [x[p] for x in sources], numbers),
            flat.numel(),
            piece,
        )
    assert base is not None, "task vectors need a base"
    words, planes = call.word_rows(device), [x.expand(out.shape).reshape(-1) for x in call.planes]
    return piecewise(
        lambda p: elementwise.sparse_blend(
            flat[p],
            base[p],
            [x[p] for x in sources],
            [x[p] for x in planes],
            numbers,
            with_high_word(words, p.start),
            low_word(p.start, device),
            form,
        ),
        flat.numel(),
        piece,
    )


def piecewise(kernel: Callable[[slice], Tensor], elements: int, piece: int) -> Tensor:
    """Run a kernel on one slice of the flattened tensors after the other; the largest of what it returns."""
    found = [kernel(slice(s, min(s + piece, elements))) for s in range(0, elements, piece)]
    return found[0] if len(found) == 1 else torch.stack(found).amax()
