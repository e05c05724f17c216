"""Inner products of a linear layer's weight gradient with LoRA products, without the gradient: `LowRankTap`.

For y = W x the gradient is G = sum_t g_t x_t^T, so  <G, s B A> = s sum_t (B^T g_t) . (A x_t):  a few columns per token
instead of a matrix as large as the weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.device import double, merging_device
from evomerge.sources.adapter.tensor_change import LowRank


class LowRankTap:
    """Adds up <G, d_i> of one linear layer over all backward passes.

    inner: (N + 1,) float64: <G, d_1> .. <G, d_N>, and a 0 for <G, b> (`chain.numbers` of a blend).
    """

    def __init__(self, changes: Sequence[LowRank | None], device: torch.device) -> None:
        """changes: d_i of each source, None where it is 0."""
        present = [(i, c) for i, c in enumerate(changes) if c is not None]
        self.right = torch.cat([c.right.float().to(device) for _, c in present])  # (R, in)
        self.left = torch.cat([c.left.float().to(device) * c.scale for _, c in present], 1)  # (out, R)
        owner = [i for i, c in present for _ in range(c.right.shape[0])]
        summing = merging_device(device)
        self.owner = torch.tensor(owner, device=summing)  # (R,) the source of each column
        self.inner = torch.zeros(len(changes) + 1, dtype=torch.float64, device=summing)

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        """A forward hook: the output, connected with this tap."""
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else kwargs["input"]
        found: Tensor = Tap.apply(x, output, self)  # type: ignore[no-untyped-call]
        return found


class Tap(torch.autograd.Function):
    """The identity on a linear layer's output, whose backward adds to `LowRankTap.inner`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, tap: LowRankTap) -> Tensor:
        """x: (..., in).  output: (..., out)."""
        ctx.tap = tap
        ctx.save_for_backward(x.detach().reshape(-1, x.shape[-1]).float() @ tap.right.T)  # (T, R)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (projected,) = ctx.saved_tensors
        tap: LowRankTap = ctx.tap
        back = gradient.reshape(-1, gradient.shape[-1]).float() @ tap.left  # (T, R)
        tap.inner.index_add_(0, tap.owner, double((back * projected).sum(0)))
        return None, gradient, None
