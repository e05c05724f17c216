"""Random masks from a counter-based hash: their keys, the words that kernels need, and a mask by itself.

An element is kept if the hash of (seed, tensor, source, element) is below its chance.  Nothing is stored, and the mask
depends neither on pieces nor on devices.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.elementwise import CHANCE, FACTOR, KEY, STEP, TENSOR_KEY, signed_word
from evomerge.merge.kernels.operands import Keys, in_row_order, number_tensor
from evomerge.merge.methods.plan import Chance


@lru_cache(maxsize=65536)
def mask_key(seed: int, tensor: str, source: str = "") -> int:
    """The 64-bit key of a tensor's random masks under one seed, or of one source's."""
    return int.from_bytes(blake2b(f"{seed}\0{tensor}\0{source}".encode(), digest_size=8).digest(), "little")


def mask_keys(seed: int, tensor: str, sources: Sequence[str]) -> Keys:
    """The keys of a tensor's masks: its own, and each source's."""
    return mask_key(seed, tensor), [mask_key(seed, tensor, s) for s in sources]


def mask_words(chances: Sequence[Chance], keys: Keys) -> list[int]:
    """The rows of `words` (5, N) that a random mask needs, one after the other; see `elementwise.sparse_blend`.

    chances: N.  keys: the tensor's, and those of the N sources.
    """
    tensor_key, source_keys = keys
    rows = dict(key_rows(tensor_key, tuple(source_keys)))
    rows[CHANCE] = [signed_word(c.low - 1 - 2**31) for c in chances]  # compared as signed numbers, with <=
    rows[STEP] = [signed_word(c.step) for c in chances]
    return in_row_order(rows)


@lru_cache(maxsize=65536)
def key_rows(tensor_key: int, source_keys: tuple[int, ...]) -> dict[int, list[int]]:
    """The rows of `mask_words` that depend on the keys alone."""
    return {
        KEY: [signed_word(k) for k in source_keys],
        FACTOR: [signed_word(k >> 32 | 1) for k in source_keys],
        TENSOR_KEY: [signed_word(tensor_key)] * len(source_keys),
    }


def with_high_word(words: Tensor, start: int) -> Tensor:
    """`words` (5, N) for elements from `start` on: beyond 2^32 the upper word of the index changes the tensor's key."""
    high = start >> 32
    if high == 0:
        return words
    words = words.clone()
    words[TENSOR_KEY] ^= signed_word(high * 0x9E3779B9)
    return words


def low_word(start: int, device: torch.device) -> Tensor:
    """The lower 32 bits of an element's index, (1,) int32."""
    return number_tensor([signed_word(start)], np.int32, device)


def random_mask(
    chance: Chance,
    start: int,
    size: int,
    keys: tuple[int, int],
    levels: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """1.0 where the elements start .. start + size - 1 are kept, else 0.0; (size,) float32.

    keys: the tensor's and the source's.
    levels: (size,) uint8, the elements' ranks, for a chance with a step.
    device: of the mask; by default that of the levels, or the CPU.
    """
    device = device or (torch.device("cpu") if levels is None else levels.device)
    words = number_tensor(mask_words([chance], (keys[0], [keys[1]])), np.int32, device).view(5, 1)
    words = with_high_word(words, start)
    index = torch.arange(size, dtype=torch.int32, device=device) + low_word(start, device)
    spread = elementwise.index_hash(index, words[TENSOR_KEY, 0])
    hashed = elementwise.source_hash(spread, words[KEY, 0], words[FACTOR, 0])
    bound = words[CHANCE, 0]
    if levels is not None:
        bound = bound + levels.int() * words[STEP, 0]
    return elementwise.at_most(hashed, bound) * float(chance != Chance(0))
