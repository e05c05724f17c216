"""Run a call in one fused CPU kernel, which torch's ahead-of-time compiler makes once; it is kept on disk.

A kept kernel is loaded in milliseconds, without the compiler.  `Compiled` also gives the launcher of CUDA kernels and
the compiled passes that measure sources.

    python -m evomerge.merge.kernels.compiled VARIANT FILE

compiles one variant.  This runs in a process of its own, because the compiler needs more memory than a merge.
"""

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.call import Call
from evomerge.merge.kernels.compiler import FileCache, run_compiler, user_cache
from evomerge.merge.kernels.elementwise import SparseForm
from evomerge.merge.kernels.launch import Launcher, one_line
from evomerge.merge.kernels.random_masks import low_word, with_high_word
from evomerge.merge.measure import scan
from evomerge.merge.measure.scan import SOURCE, Scan, compile_scan
from evomerge.sources.checkpoint import TensorInfo

Kernel = Callable[[list[Tensor]], Tensor]
WORTHWHILE = 1 << 25  # elements of a model: below it a compilation takes longer than it saves
SLAB = 1 << 30  # elements of one kernel call at most: an int32 indexes them


@dataclass(frozen=True)
class Variant:
    """What of a call is compiled into a kernel.

    out, base, sources: types; base is None for a blend of the tensors themselves.
    count: the number of sources.
    levels: the type of the planes, if there are any.
    form: None for `blend`.
    """

    out: torch.dtype
    base: torch.dtype | None
    sources: torch.dtype
    count: int
    levels: torch.dtype | None = None
    form: SparseForm | None = None

    @classmethod
    def of(
        cls,
        out: Tensor,
        base: Tensor | None,
        sources: Sequence[Tensor],
        planes: Sequence[Tensor] = (),
        form: SparseForm | None = None,
    ) -> "Variant":
        """The variant for these tensors."""
        base_type, levels = None if base is None else base.dtype, planes[0].dtype if planes else None
        return cls(out.dtype, base_type, sources[0].dtype, len(sources), levels, form)

    def to_json(self) -> str:
        """The variant as the text that `from_json` reads."""
        return json.dumps(asdict(self), default=lambda dtype: str(dtype).removeprefix("torch."))

    @classmethod
    def from_json(cls, text: str) -> "Variant":
        """The variant that `to_json` wrote."""
        fields = json.loads(text)
        for name in ("out", "base", "sources", "levels"):
            fields[name] = fields[name] and getattr(torch, fields[name])
        return cls(**fields | {"form": fields["form"] and SparseForm(**fields["form"])})

    @property
    def file_name(self) -> str:
        """The name of the compiled file: it changes with the variant, the machine and the source code."""
        kind = "blend" if self.form is None else f"sparse-{self.form.keep}"
        text = self.to_json() + machine_features() + source_code()
        return f"{kind}-{self.count}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.pt2"

    def example(self) -> tuple[Any, ...]:
        """Operands of the right types and any length, to trace with."""

        def flat(dtype: torch.dtype) -> Tensor:
            return torch.zeros(4096, dtype=dtype)

        head = [flat(self.out)] + ([] if self.base is None else [flat(self.base)])
        terms = [flat(self.sources) for _ in range(self.count)]
        if self.form is None:
            return (*head, *terms, torch.ones(self.count))
        planes = [] if self.levels is None else [flat(self.levels) for _ in range(self.count)]
        numbers = torch.ones((6, self.count))
        words = torch.ones((5, self.count), dtype=torch.int32)
        return (*head, *terms, *planes, numbers, words, torch.zeros(1, dtype=torch.int32))


class Fusable(nn.Module):
    """A variant's kernel as a module, which `torch.export` needs."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, *operands: Tensor) -> Tensor:
        v = self.variant
        if v.form is None:
            *tensors, coefficients = operands
            out, *rest = tensors
            origin = None if v.base is None else rest.pop(0)
            return elementwise.blend(out, origin, rest, coefficients)
        out, base, *middle = operands[:-3]
        numbers, words, start = operands[-3:]
        return elementwise.sparse_blend(out, base, middle[: v.count], middle[v.count :], numbers, words, start, v.form)


class Compiled:
    """The compiled code of this machine: fused CPU kernels, CUDA kernels, and passes that measure sources.

    What is not on disk is compiled and kept there.  A variant that cannot be compiled is run by torch, the others are
    not affected, and each reason is logged once.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        """folder: where compiled files are kept.  log: gets one line for each message."""
        self.files = FileCache(folder, log)
        self.log = log
        self.loaded: dict[Variant, Kernel | None] = {}
        self.reasons: set[str] = set()

    def kernel(self, variant: Variant) -> Kernel | None:
        """The fused kernel of a variant; None if it cannot be compiled."""
        if variant not in self.loaded:
            self.loaded[variant] = self.load(variant)
        return self.loaded[variant]

    def load(self, variant: Variant) -> Kernel | None:
        """Load a kernel from its file, which is compiled if it is not there."""

        def make(file: Path) -> None:
            started = time.monotonic()
            compile_apart(variant, file)
            self.log(f"compiled the kernel {variant.file_name} in {time.monotonic() - started:.0f} s; it is kept")

        try:
            file = self.files.file(variant.file_name, make)
            # What torch._inductor.aoti_load_package does, without importing the compiler.
            runner = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1).run
        except Exception as error:  # a compiler fails in many ways, and the merge must go on
            if (reason := one_line(error)) not in self.reasons:
                self.reasons.add(reason)
                kind = Path(variant.file_name).stem
                self.log(f"{kind} runs uncompiled, which makes a sparse merge about ten times slower ({reason})")
            return None
        return lambda operands: runner(operands)[0]

    @cached_property
    def launcher(self) -> Launcher:
        """What runs calls on CUDA devices."""
        return Launcher(self.log)

    @cached_property
    def scan(self) -> Scan:
        """The passes that measure the sources; in torch where they cannot be compiled."""
        text = SOURCE.read_text(encoding="utf-8") + machine_features() + Path(scan.__file__).read_text(encoding="utf-8")
        name = f"scan-{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
        try:
            return Scan(self.files.file(name, compile_scan))
        except Exception as error:
            self.log(
                f"the sources are measured without a compiler, which takes several times as long ({one_line(error)})"
            )
            return Scan()


def fused_call(call: Call, out: Tensor, compiled: Compiled) -> Tensor | None:
    """What `piecewise_call` computes, in one fused kernel; None if there is none for this call."""
    if call.is_copy or not call.sources:
        return None
    form, device, flat = call.form, out.device, out.view(-1)
    base = None if call.base is None else call.base.reshape(-1)
    sources = same_type([x.reshape(-1) for x in call.sources])
    planes = [x.expand(out.shape).reshape(-1) for x in call.planes]
    kernel = compiled.kernel(Variant.of(flat, base, sources, planes, form))
    if kernel is None:
        return None
    numbers, words = call.number_rows(device), call.word_rows(device)

    def run(parts: Sequence[Tensor], start: int) -> Tensor:
        mask = [] if form is None else [with_high_word(words, start), low_word(start, device)]
        return kernel([*parts, numbers, *mask])

    return in_slabs([flat, *([] if base is None else [base]), *sources, *planes], run)


def same_type(operands: list[Tensor]) -> list[Tensor]:
    """Operands of one type, so that few variants are compiled; widening changes no value."""
    types = {x.dtype for x in operands}
    return operands if len(types) == 1 else [x.float() for x in operands]


def in_slabs(operands: Sequence[Tensor], run: Callable[[Sequence[Tensor], int], Tensor]) -> Tensor:
    """Run a fused kernel on slices that an int32 can index.

    operands: flat tensors; a kernel assumes that their elements are contiguous.
    run: (slices of the operands, first element) -> the largest |out|.
    """
    operands = [x.contiguous() for x in operands]
    elements = operands[0].numel()
    if elements <= SLAB:
        return run(operands, 0)
    return torch.stack([run([x[s : s + SLAB] for x in operands], s) for s in range(0, elements, SLAB)]).amax()


def compiled_for(
    tensors: Mapping[str, TensorInfo], device: torch.device | str, log: Callable[[str], None]
) -> Compiled | None:
    """The compiled kernels for merging these tensors; None if a compilation takes longer than it saves.

    On a CUDA device it always saves: a compilation takes a second, and torch launches a kernel for each of hundreds of
    tensors.
    """
    elements = sum(math.prod(t.shape) for t in tensors.values())
    worthwhile = elements >= WORTHWHILE or torch.device(device).type == "cuda"
    return Compiled(user_cache("kernels"), log) if worthwhile else None


def compile_apart(variant: Variant, file: Path) -> None:
    """Compile a variant in another process.  RuntimeError with the compiler's last line.

    file: in a folder of its own.  The compiler keeps what it generates under names that depend on the code alone, and
    two compilations of one variant in one folder could each pack half of the other's files.
    """
    folder = file.parent
    command = [sys.executable, "-W", "ignore", "-m", __name__, variant.to_json(), str(file)]
    run_compiler(["env", f"TORCHINDUCTOR_CACHE_DIR={folder}", f"TMPDIR={folder}", *command])


def compile_to(variant: Variant, file: Path) -> None:
    """Compile a variant into a package that `aoti_load_package` can load."""
    n = torch.export.Dim("n", min=2, max=1 << 30)
    example = variant.example()
    lengths = tuple({0: n} if x.ndim == 1 and x.numel() == 4096 else {} for x in example)
    exported = torch.export.export(Fusable(variant), example, dynamic_shapes=(lengths,))
    options: dict[str, bool | int] = {"cpp.dynamic_threads": True, "emulate_precision_casts": True}
    options["realize_opcount_threshold"] = 8  # otherwise short kernels get pairs of vectors, at half the speed
    torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=options)


@cache
def machine_features() -> str:
    """What a compiled kernel depends on besides its source: torch's version, machine and vector instructions."""
    return f"{torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def source_code() -> str:
    """The source of the fused kernels and of this file; with another, they are compiled again."""
    return Path(elementwise.__file__).read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")


if __name__ == "__main__":
    compile_to(Variant.from_json(sys.argv[1]), Path(sys.argv[2]))
