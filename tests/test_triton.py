"""The kernels for CUDA without a GPU: their bits by Triton's interpreter, their machine code as far as PTX."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import KEYS, PLANS, operands

from evomerge.merge.kernels.call import call_of
from evomerge.merge.kernels.elementwise import SparseForm
from evomerge.merge.kernels.launch import WARPS, Kind, Launcher, kernel_of
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.piecewise import piecewise_call

triton = pytest.importorskip("triton", reason="there is no Triton for this platform", exc_type=ImportError)
TESTS = Path(__file__).resolve().parent
HALF = torch.bfloat16
FORMS = {
    "blend": None,
    "ties": SparseForm("magnitude", "weighted", True, False),
    "band": SparseForm("band", None, False, False),
    "random": SparseForm("random", "weighted", True, False),
    "rank": SparseForm("rank", "weighted", True, False),
    "variance": SparseForm("variance", "plain", True, False),
    "alone": SparseForm("magnitude", None, True, True),
    "importance": SparseForm("importance", None, False, False),
}


def test_interpreted_kernels_give_the_same_bits():
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", str(TESTS / "interpreted.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 80
    assert [x for x in found if not (x["same"] and x["largest"])] == []


def compiled(kind: Kind) -> Any:
    """A kind's kernel compiled for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from evomerge.merge.kernels import triton_kernels

    kernel, constants = kernel_of(triton_kernels, kind)
    names = kernel.arg_names
    types = {"blocks": "*i32", "addresses": "*i64", "settings": "*i32", "largest": "*i32"}
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    options = {"enable_fp_fusion": False, "num_warps": WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", FORMS)
def test_machine_code_rounds_each_operation_by_itself(name: str):
    kind = Kind(FORMS[name], (HALF,) * 5, aligned=True)
    made = compiled(kind)
    ptx = made.asm["ptx"]
    assert not re.search(r"\bfma\.|\bmad\.\w*\.?f32|\.ftz|\.approx|div\.full", ptx)
    divides = FORMS[name] is not None and (FORMS[name].normalize or FORMS[name].keep == "variance")
    assert ("div.rn.f32" in ptx) == divides
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)
    assert not re.search(r"cvt\.rz\.bf16", ptx)
    operands_read = re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx)
    assert len(operands_read) >= 4, "base and three sources, sixteen bytes at once"
    assert re.search(r"st\.global\.v4\.b32|st\.global\.v2\.b64", ptx)
    assert ".local" not in ptx, "numbers were spilled from the registers"
    assert not hasattr(made.metadata, "n_spills") or not made.metadata.n_spills


@pytest.mark.parametrize("types", [(torch.float16, torch.float32, HALF, torch.float16), (torch.float32,) * 12], ids=str)
@pytest.mark.parametrize("name", ["blend", "rank"])
def test_kernels_compile_for_mixed_types_and_odd_addresses(name: str, types: tuple[torch.dtype, ...]):
    assert "cubin" in compiled(Kind(FORMS[name], types, aligned=False)).asm


def test_a_kernel_that_cannot_run_falls_back_and_the_others_stay(monkeypatch: pytest.MonkeyPatch):
    """Without a driver no kernel runs: each kind is tried once, and torch gives the same bits."""
    lines: list[str] = []
    launcher = Launcher(lines.append)
    base, sources = operands(503)
    jobs = [(torch.empty(503), call_of(PLANS[n], Operands(base, sources, (), KEYS))) for n in ("trim", "drop", "trim")]
    for _ in range(2):
        largest = launcher.run(jobs)
    assert len(lines) == 2
    assert "sparse_blend (magnitude) of 3 sources runs uncompiled on the device" in lines[0]
    for (out, call), found in zip(jobs, largest, strict=True):
        expected = torch.empty(503)
        assert torch.equal(piecewise_call(call, expected, 100), found)
        assert torch.equal(out, expected)
