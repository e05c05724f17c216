"""The change that an adapter makes to one tensor of its base, and how it is applied."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 15  # elements of a product computed at a time: they fit a core's cache, and torch stays on one thread
BLOCK_ON_ACCELERATOR = 1 << 26  # there a kernel launch costs more than a pass over memory


@dataclass(frozen=True, eq=False)
class LowRank:
    """The product scale * left @ right, in the layout of the stored tensor.

    left: (rows, R).  right: (R, columns).  Both have an axis of experts in front for a tensor that stacks experts.
    """

    left: Tensor
    right: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.left.shape[:-1], self.right.shape[-1]

    def to(self, device: torch.device) -> "LowRank":
        """The same product with its factors on a device."""
        return LowRank(self.left.to(device), self.right.to(device), self.scale)

    def product(self) -> Tensor:
        """The product in float32: (rows, columns), or (experts, rows, columns)."""
        if self.left.ndim == 2:
            return low_rank_product(self.left, self.right).mul_(self.scale)
        return torch.stack([low_rank_product(b, a) for b, a in zip(self.left, self.right, strict=True)]).mul_(
            self.scale
        )


@dataclass
class TensorChange:
    """The change of one tensor; its parts are applied in this order.

    whole: replaces the tensor.
    low_rank, added: are added to it.
    rows: row numbers (tokens,) and the rows (tokens, width) that replace those (trained tokens); a row number beyond
        the last row makes the tensor longer.
    """

    whole: Tensor | None = None
    low_rank: LowRank | None = None
    added: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    @property
    def computes(self) -> bool:
        """Whether applying the change computes something, rather than only reading another tensor."""
        return self.low_rank is not None or self.added is not None or self.rows is not None

    def row_count(self, rows: int) -> int:
        """The number of rows after the change of a tensor that has `rows` rows."""
        rows = rows if self.whole is None else self.whole.shape[0]
        return rows if self.rows is None else max(rows, int(self.rows[0].max()) + 1)

    def apply(self, original: Tensor) -> Tensor:
        """The changed tensor, float32 if anything is added.

        original: the tensor of the base; not used if `whole` replaces it.
        """
        out = original if self.whole is None else self.whole
        if self.low_rank is not None:
            out = self.low_rank.product().add_(out)
        if self.added is not None:
            out = self.added.float() + out
        if self.rows is not None:
            indices, values = self.rows
            new = torch.empty((self.row_count(len(out)) - len(out), *out.shape[1:]), dtype=out.dtype, device=out.device)
            out = torch.cat([out, new]).index_copy_(0, indices, values.to(out.dtype))
        return out

    def to(self, device: torch.device) -> "TensorChange":
        """The same change with its tensors on a device."""
        whole, added = (None if x is None else x.to(device) for x in (self.whole, self.added))
        rows = None if self.rows is None else (self.rows[0].to(device), self.rows[1].to(device))
        return TensorChange(whole, None if self.low_rank is None else self.low_rank.to(device), added, rows)

    def equals(self, other: "TensorChange | None") -> bool:
        """Whether both changes consist of the same tensors, bit for bit."""
        if other is None:
            return False
        pairs = list(zip(self.content(), other.content(), strict=True))
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

    def content(self) -> list[Tensor | None]:
        """The tensors of the change in a fixed order, None for those that it lacks."""
        product, rows = self.low_rank, self.rows
        scale = None if product is None else torch.tensor(product.scale)
        sides = [None, None] if product is None else [product.left, product.right]
        return [self.whole, self.added, scale, *sides, *(rows or (None, None))]


def low_rank_product(b: Tensor, a: Tensor) -> Tensor:
    """The matrix product B A in float32, summed rank by rank in one fixed order.

    b: (rows, R).  a: (R, columns).

    A library's matrix product may sum in another order on another machine; here the same adapter gives the same bits
    everywhere.
    """
    b, a = b.float(), a.float()
    out = torch.empty(b.shape[0], a.shape[1], device=a.device)
    block_size = BLOCK if a.device.type == "cpu" else BLOCK_ON_ACCELERATOR
    rows = min(b.shape[0], max(1, block_size // max(1, a.shape[1])))
    term = torch.empty(rows, a.shape[1], device=a.device)
    for start in range(0, b.shape[0], rows):
        block = out[start : start + rows]
        scratch = term[: block.shape[0]]
        torch.mul(b[start : start + rows, :1], a[:1], out=block)
        for r in range(1, a.shape[0]):
            torch.mul(b[start : start + rows, r : r + 1], a[r : r + 1], out=scratch)
            block.add_(scratch)
    return out
