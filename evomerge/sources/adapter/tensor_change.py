"""What an adapter does to one tensor of its base."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 15  # elements of a delta worked on at a time: cached, and below torch's threading grain
BLOCK_ON_ACCELERATOR = 1 << 26  # there a launch costs more than a pass over memory


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale * left @ right, as the tensor is stored.

    left: (rows, rank), right: (rank, columns); with an axis of experts in front for a tensor that stacks them.
    """

    left: Tensor
    right: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.left.shape[:-1], self.right.shape[-1]

    def to(self, device: torch.device) -> "LowRank":
        """The same, computed on a device."""
        return LowRank(self.left.to(device), self.right.to(device), self.scale)

    def product(self) -> Tensor:
        """The matrix (or one for each expert) in float32."""
        if self.left.ndim == 2:
            return low_rank_product(self.left, self.right).mul_(self.scale)
        return torch.stack([low_rank_product(b, a) for b, a in zip(self.left, self.right, strict=True)]).mul_(
            self.scale
        )


@dataclass
class Change:
    """What becomes of a tensor, in this order.

    whole: replaces it.  low_rank, added: are added to it.  rows: indices and the rows that replace those (trained
    tokens); rows beyond its own make it longer.
    """

    whole: Tensor | None = None
    low_rank: LowRank | None = None
    added: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    @property
    def computes(self) -> bool:
        """Whether applying it is more than reading a file."""
        return self.low_rank is not None or self.added is not None or self.rows is not None

    def height(self, rows: int) -> int:
        """How many rows a tensor of so many has afterwards."""
        rows = rows if self.whole is None else self.whole.shape[0]
        return rows if self.rows is None else max(rows, int(self.rows[0].max()) + 1)

    def apply(self, original: Tensor) -> Tensor:
        """The changed tensor, float32 if anything is added.  original: unused if all of it is replaced."""
        out = original if self.whole is None else self.whole
        if self.low_rank is not None:
            out = self.low_rank.product().add_(out)
        if self.added is not None:
            out = self.added.float() + out
        if self.rows is not None:
            where, values = self.rows
            longer = torch.empty((self.height(len(out)) - len(out), *out.shape[1:]), dtype=out.dtype, device=out.device)
            out = torch.cat([out, longer]).index_copy_(0, where, values.to(out.dtype))
        return out

    def to(self, device: torch.device) -> "Change":
        """The same, computed on a device."""
        whole, added = (None if x is None else x.to(device) for x in (self.whole, self.added))
        rows = None if self.rows is None else (self.rows[0].to(device), self.rows[1].to(device))
        return Change(whole, None if self.low_rank is None else self.low_rank.to(device), added, rows)

    def same_as(self, other: "Change | None") -> bool:
        """Whether both make the same of the same tensor, bit for bit."""
        if other is None:
            return False
        pairs = list(zip(self.parts(), other.parts(), strict=True))
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

    def parts(self) -> list[Tensor | None]:
        """All that it consists of."""
        product, rows = self.low_rank, self.rows
        scale = None if product is None else torch.tensor(product.scale)
        sides = [None, None] if product is None else [product.left, product.right]
        return [self.whole, self.added, scale, *sides, *(rows or (None, None))]


def low_rank_product(b: Tensor, a: Tensor) -> Tensor:
    """B A in float32, (out, rank) x (rank, in), summed rank by rank in one fixed order.

    A library's matrix product may sum in another order on another machine; here the same adapter gives the
    same bits everywhere.
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
