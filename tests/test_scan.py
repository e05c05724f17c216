"""The compiled passes over tensors give the bits of those in torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.measure import sums
from evomerge.merge.measure.scan import Scan

TYPES = [torch.float32, torch.bfloat16, torch.float16]
IN_TORCH = Scan()


@pytest.fixture(scope="module")
def scan() -> Scan:
    lines: list[str] = []
    found = Compiled(Path(__file__).resolve().parent.parent / ".cache" / "kernels", lines.append).scan
    if found.library is None:
        pytest.skip(f"nothing can be compiled here: {lines}")
    return found


def answers(scan: Scan, base: Tensor, sources: Sequence[Tensor]) -> dict[str, object]:
    """All that can be asked, as what can be compared."""
    found: dict[str, object] = {"gram": scan.gram_matrix([base, *sources]).tolist()}
    found["task gram"] = scan.gram_matrix(sources, origin=base).tolist()
    for i, x in enumerate(sources):
        levels = scan.levels(base, x)
        found[f"levels {i}"] = levels.shape, levels.dtype, levels.tolist()
        found[f"l1 {i}"] = scan.l1(base, x, levels), scan.l1(base, x)
        found[f"sizes {i}"] = {k: v.tolist() for k, v in scan.magnitudes(base, x).state().items()}
    return found


def numbers(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    noise = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
    match kind:
        case "few values":
            return (2 * noise).round() / 2
        case "many orders":
            return noise * 10.0 ** torch.tensor(rng.integers(-44, 4, size=shape), dtype=torch.float32)
        case "zeros":
            return torch.zeros(shape)
        case "infinite":
            return noise.masked_fill(noise > 2, torch.inf)
    return noise


KINDS = ["noise", "few values", "many orders", "zeros", "infinite"]


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple) | st.tuples(st.integers(0, 5000)),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    types=st.tuples(*[st.sampled_from(TYPES)] * 3),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_compiled_passes_give_the_same_bits(
    scan: Scan, shape: tuple[int, ...], kinds: Sequence[str], types: Sequence[torch.dtype], seed: int
):
    rng = np.random.default_rng(seed)
    base, *sources = (numbers(k, shape, rng).to(t) for k, t in zip(kinds, types, strict=True))
    base = base.masked_fill(~base.isfinite(), 0.0)  # infinite less infinite is not a number, and equal to none
    assert repr(answers(scan, base, sources)) == repr(answers(IN_TORCH, base, sources))


@pytest.mark.parametrize("sizes", [(29, 64, 64), (100, 70, 500), (2129, 2130, 2131), (5000, 64, 200), (7, 3000, 9000)])
def test_sums_have_the_order_of_the_lanes(scan: Scan, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch):
    for name, size in zip(("CHUNK", "LANES", "SEGMENT"), sizes, strict=True):
        monkeypatch.setattr(sums, name, size)
    rng = np.random.default_rng(0)
    base, *sources = (numbers("noise", (130, 71), rng) for _ in range(3))
    assert answers(scan, base, sources) == answers(IN_TORCH, base, sources)


def test_a_long_tensor_of_many_magnitudes_is_counted_like_any_other(scan: Scan):
    rng = np.random.default_rng(0)
    base = numbers("noise", (3, 200_000), rng).bfloat16()
    sources = [base + (0.01 * numbers("noise", base.shape, rng)).bfloat16(), numbers("many orders", base.shape, rng)]
    assert answers(scan, base, sources) == answers(IN_TORCH, base, sources)


def test_every_float16_is_read_as_it_is(scan: Scan):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    assert answers(scan, torch.zeros_like(every), [every]) == answers(IN_TORCH, torch.zeros_like(every), [every])


def test_what_the_library_cannot_read_is_measured_in_torch(scan: Scan):
    base, x = torch.randn(50, 60), torch.randn(60, 50).T
    assert not scan.reads([base, x])
    assert answers(scan, base, [x]) == answers(IN_TORCH, base, [x.contiguous()])
    assert not scan.reads([base.double()])


def test_without_a_compiler_sources_are_measured_in_torch_and_the_log_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    lines: list[str] = []
    found = Compiled(tmp_path, lines.append).scan
    assert found.library is None
    assert len(lines) == 1
    assert "several times as long" in lines[0]
    assert "/nowhere/g++" in lines[0]
    assert list(tmp_path.iterdir()) == []
