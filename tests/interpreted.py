"""Run with TRITON_INTERPRET=1: the Triton kernels on the CPU, beside torch's; every case is one line of JSON.

Float32 outputs must have the same bits.  (Triton's interpreter does not round a bfloat16 store to the nearest.)
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from models import write_adapter, write_family
from test_kernels import KEYS, PLANS, RANKED, WEIGHTS, chance
from torch import Tensor

from evomerge.merge.kernels.call import Call, call_of
from evomerge.merge.kernels.launch import Launcher
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.piecewise import piecewise_call
from evomerge.merge.materialise import materialise
from evomerge.merge.measure.measurements import no_levels
from evomerge.merge.methods.plan import Blend, SparseBlend
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource

Case = tuple[str, Call, tuple[int, ...]]
MIXED = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)


def operands(
    shape: tuple[int, ...], types: tuple[torch.dtype, ...] = MIXED, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and sources near it; a third of the elements of each source are the base's, so that signs are of zeros."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(types[0])
    sources = []
    for dtype in types[1:]:
        moved = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 1 / 3)
        sources.append((base.float() + moved).to(dtype))
    return base, sources


def planes_for(plan: object, base: Tensor) -> list[Tensor]:
    if isinstance(plan, SparseBlend) and plan.keep == "rank":
        levels = torch.arange(base.numel()).remainder(256).to(torch.uint8).view(base.shape)
        return [levels, levels.flip(0).contiguous(), levels]
    if isinstance(plan, SparseBlend) and plan.keep == "importance":
        return [torch.linspace(0.0, 2.0, base.shape[0]).view(-1, *[1] * (base.ndim - 1))]
    return []


def cases() -> Iterator[Case]:
    for name, plan in PLANS.items():
        for shape in ((37, 53), (64, 80), (5003,), (1,)):
            base, sources = operands(shape)
            planes = planes_for(plan, base)
            used = sources[: len(planes)] if planes else sources
            if isinstance(plan, Blend | SparseBlend):
                yield f"{name} {shape}", call_of(plan, Operands(base, used, planes, KEYS)), shape
    base, sources = operands((300, 7))
    for elect in (None, "weighted", "plain"):
        for normalize in (False, True):
            for alone in (None, (1.1, 1.2, 1.3)):
                plan = SparseBlend(WEIGHTS, "magnitude", None, (0.3, 0.9, 0.0), alone=alone, elect=elect)
                plan = replace(plan, normalize=normalize, scale=1.3)
                yield f"{elect} {normalize} {alone}", call_of(plan, Operands(base, sources, (), KEYS)), base.shape
    ranked = SparseBlend(WEIGHTS, "rank", chances=(*RANKED[:2], chance(0.9)), elect="weighted", normalize=True)
    levels = planes_for(ranked, base)
    yield (
        "a plane that is one number",
        call_of(ranked, Operands(base, sources, [*levels[:2], no_levels(base)], KEYS)),
        base.shape,
    )
    yield (
        "a source that is the base",
        call_of(PLANS["trim"], Operands(base, [base, *sources[1:]], (), KEYS)),
        base.shape,
    )
    yield "the base alone", call_of(PLANS["arithmetic"], Operands(base, [base] * 3)), base.shape
    yield "nothing", call_of(Blend((0.0,)), Operands(base, sources[:1])), base.shape
    turned, turned_sources = operands((7, 300))
    yield "turned", call_of(PLANS["trim"], Operands(turned.T, [x.T for x in turned_sources], (), KEYS)), base.shape
    for types in ((torch.float32,) * 2, (torch.bfloat16,) * 3, (torch.float16,) * 9, (torch.bfloat16,) * 13):
        base, sources = operands((1024,), types)
        n = len(sources)
        weights = tuple(0.1 * i - 0.4 for i in range(n))
        yield f"{n} sources", call_of(Blend(weights, of_task_vectors=True), Operands(base, sources)), base.shape
        plan = SparseBlend(weights, "magnitude", floors=(0.4,) * n, elect="weighted", normalize=True)
        yield f"{n} sparse", call_of(plan, Operands(base, sources)), base.shape
    base, sources = operands((40, 50), (torch.float32, torch.bfloat16))
    turn = SparseBlend((1.0,), "importance", floors=(0.4,))
    planes = planes_for(turn, base)
    yield "a source on a float32 result", call_of(turn, Operands(base, sources, planes, KEYS)), base.shape
    for broken in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        base, sources = operands((40, 50))
        sources[1] = sources[1].clone()
        sources[1][3, 4] = broken
        for name in ("arithmetic", "trim", "drop"):
            yield f"{name} with {broken}", call_of(PLANS[name], Operands(base, sources, (), KEYS)), base.shape
    base, sources = operands((999,))
    tiny = [x.float() * 1e-39 for x in (base, *sources)]
    yield "denormals", call_of(PLANS["arithmetic"], Operands(tiny[0], tiny[1:])), base.shape


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether the bits are the same, those of NaN aside."""
    return bool(
        torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(0.0, 9.0, -9.0), y.nan_to_num(0.0, 9.0, -9.0))
        and torch.equal(x.signbit() & ~x.isnan(), y.signbit() & ~y.isnan())
    )


def main() -> None:
    lines: list[str] = []
    launcher = Launcher(lines.append)
    every = list(cases())
    outs = [torch.empty(shape) for _, _, shape in every]
    largest = launcher.run([(out, call) for out, (_, call, _) in zip(outs, every, strict=True)])
    again = launcher.run([(out, call) for out, (_, call, _) in zip(outs, every, strict=True)])
    for (name, call, shape), out, found in zip(every, outs, largest, strict=True):
        expected = torch.empty(shape)
        size = piecewise_call(call, expected, 1 << 20)
        print(json.dumps({"case": name, "same": equal(out, expected), "largest": equal(found, size)}))
    print(json.dumps({"case": "kept tables", "same": equal(largest, again), "largest": True}))
    print(json.dumps({"case": "nothing ran uncompiled", "same": not lines, "largest": True, "log": lines}))


def far_elements() -> bool:
    """A random mask's words beyond 2^32 elements: a table that says the tensor began so far before."""
    from evomerge.merge.kernels import triton_kernels
    from evomerge.merge.kernels.elementwise import sparse_blend
    from evomerge.merge.kernels.launch import blocks_of, kernel_of, kind_and_row, settings_of
    from evomerge.merge.kernels.random_masks import low_word, with_high_word

    base, sources = operands((3000,), (torch.float32,) * 4)
    call = call_of(PLANS["drop"], Operands(base, sources, (), KEYS))
    out, expected = torch.empty(3000), torch.empty(3000)
    kind, row = kind_and_row(0, out, call)
    assert kind is not None
    start = (5 << 32) + 7 * kind.block
    at = [x - 4 * start if x else 0 for x in (*row[1:3], *row[5:])]
    addresses = torch.tensor([[start + 3000, *at[:2], *row[3:5], *at[2:]]])
    blocks = torch.from_numpy(blocks_of([3000], kind.block))
    blocks[:, 1] += start // kind.block
    kernel, constants = kernel_of(triton_kernels, kind)
    largest = torch.zeros(1, dtype=torch.int32)
    kernel[(len(blocks),)](blocks, addresses, torch.from_numpy(settings_of([call])), largest, **constants)
    cpu = torch.device("cpu")
    words, numbers = with_high_word(call.word_rows(cpu), start), call.number_rows(cpu)
    sparse_blend(expected, base, sources, [], numbers, words, low_word(start, cpu), call.form)
    near = torch.empty(3000)
    piecewise_call(call, near, 1 << 20)
    return equal(out, expected) and not equal(near, expected)


def candidates(folder: Path) -> Iterator[tuple[str, bool]]:
    """Whole candidates of a tiny model: launched together, and tensor by tensor."""
    folders = write_family(folder, ("one", "two"))
    folders["adapter"] = write_adapter(folder / "adapter", folders["base"])
    sources = [RecipeSource(name=n, path=str(folders[n])) for n in ("one", "two", "adapter")]
    for method, parameters in {
        "task_arithmetic": {"weight": {"mlp": 0.3, "default": [0.5, 0.0]}},
        "ties": {"weight": 0.4, "density": 0.5},
        "dare_ties": {"weight": 0.4, "density": 0.5},
        "della": {"weight": 0.4, "density": 0.5, "epsilon": 0.1},
        "tsv": {},
    }.items():
        recipe = Recipe(
            method=method,
            dtype="float32",
            base=Model(path=str(folders["base"])),
            sources=sources,
            parameters=parameters,
        )
        bank = open_bank(recipe)
        outs = [{n: torch.empty(t.shape) for n, t in bank.layout.tensors.items()} for _ in range(2)]
        materialise(recipe, bank, outs[0])
        lines: list[str] = []
        bank.launcher = Launcher(lines.append)
        materialise(recipe, bank, outs[1])
        yield method, not lines and all(equal(outs[0][n], outs[1][n]) for n in outs[0])


if __name__ == "__main__":
    main()
    print(json.dumps({"case": "far elements", "same": far_elements(), "largest": True}))
    with tempfile.TemporaryDirectory() as folder:
        for name, same in candidates(Path(folder)):
            print(json.dumps({"case": f"candidate of {name}", "same": same, "largest": True}))
