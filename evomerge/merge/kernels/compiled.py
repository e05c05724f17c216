"""The CPU's kernels fused by torch's ahead-of-time compiler: once per machine, kept on disk, loaded in milliseconds.

    python -m evomerge.merge.kernels.compiled VARIANT FILE

compiles one; it runs in a process of its own, because the compiler's memory is larger than a merge's.
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
from evomerge.merge.kernels.compiler import Kept, run_compiler, user_cache
from evomerge.merge.kernels.elementwise import SparseForm
from evomerge.merge.kernels.launch import Launcher, last_word
from evomerge.merge.measure import scan
from evomerge.merge.measure.scan import SOURCE, Scan, compile_scan
from evomerge.sources.checkpoint import TensorInfo

Kernel = Callable[[list[Tensor]], Tensor]
WORTHWHILE = 1 << 25  # elements of a model: below it a compilation takes longer than it saves


@dataclass(frozen=True)
class Variant:
    """What of a kernel call is compiled in.

    count: operands beside out and base.  levels: the type of the planes, if the mask has them.
    """

    out: torch.dtype
    base: torch.dtype | None
    sources: torch.dtype
    count: int
    levels: torch.dtype | None = None
    form: SparseForm | None = None

    @classmethod
    def of_blend(cls, out: Tensor, origin: Tensor | None, terms: Sequence[Tensor]) -> "Variant":
        base = None if origin is None else origin.dtype
        return cls(out.dtype, base, terms[0].dtype, len(terms))

    @classmethod
    def of_sparse(
        cls, out: Tensor, base: Tensor, sources: Sequence[Tensor], planes: Sequence[Tensor], form: SparseForm
    ) -> "Variant":
        levels = planes[0].dtype if planes else None
        return cls(out.dtype, base.dtype, sources[0].dtype, len(sources), levels, form)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=lambda dtype: str(dtype).removeprefix("torch."))

    @classmethod
    def from_json(cls, text: str) -> "Variant":
        fields = json.loads(text)
        for name in ("out", "base", "sources", "levels"):
            fields[name] = fields[name] and getattr(torch, fields[name])
        return cls(**fields | {"form": fields["form"] and SparseForm(**fields["form"])})

    @property
    def file_name(self) -> str:
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
    """A variant's kernel as the module that the exporter wants."""

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
    """The compiled kernels of this machine; those of a CUDA device are the launcher's.

    A variant that is not on disk is compiled and kept there; one that cannot be compiled runs uncompiled, the others
    stay, and `log` is told once for each reason.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.files = Kept(folder, log)
        self.log = log
        self.loaded: dict[Variant, Kernel | None] = {}
        self.reasons: set[str] = set()

    def kernel(self, variant: Variant) -> Kernel | None:
        """The fused kernel of a variant; None where there is none and the caller should go piece by piece."""
        if variant not in self.loaded:
            self.loaded[variant] = self.load(variant)
        return self.loaded[variant]

    def load(self, variant: Variant) -> Kernel | None:
        def make(file: Path) -> None:
            started = time.monotonic()
            compile_apart(variant, file)
            self.log(f"compiled the kernel {variant.file_name} in {time.monotonic() - started:.0f} s; it is kept")

        try:
            file = self.files.file(variant.file_name, make)
            # What torch._inductor.aoti_load_package does, without importing the compiler.
            runner = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1).run
        except Exception as error:  # a compiler fails in many ways, and none may cost the merge
            if (reason := last_word(error)) not in self.reasons:
                self.reasons.add(reason)
                kind = Path(variant.file_name).stem
                self.log(f"{kind} runs uncompiled, which makes a sparse merge about ten times slower ({reason})")
            return None
        return lambda operands: runner(operands)[0]

    @cached_property
    def launcher(self) -> Launcher:
        """The kernels of CUDA devices."""
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
                f"the sources are measured without a compiler, which takes several times as long ({last_word(error)})"
            )
            return Scan()


def compiled_for(
    tensors: Mapping[str, TensorInfo], device: torch.device | str, log: Callable[[str], None]
) -> Compiled | None:
    """The compiled kernels for merging these tensors, None where a compilation takes longer than it saves.

    On a CUDA device a compilation takes a second, and a launch for each of hundreds of tensors is always slower.
    """
    elements = sum(math.prod(t.shape) for t in tensors.values())
    worthwhile = elements >= WORTHWHILE or torch.device(device).type == "cuda"
    return Compiled(user_cache("kernels"), log) if worthwhile else None


def compile_apart(variant: Variant, file: Path) -> None:
    """Compile a variant in another process.  RuntimeError with the compiler's last word."""
    run_compiler([sys.executable, "-W", "ignore", "-m", __name__, variant.to_json(), str(file)])


def compile_to(variant: Variant, file: Path) -> None:
    """Compile a variant into a package that `aoti_load_package` opens."""
    n = torch.export.Dim("n", min=2, max=1 << 30)
    example = variant.example()
    lengths = tuple({0: n} if x.ndim == 1 and x.numel() == 4096 else {} for x in example)
    exported = torch.export.export(Fusable(variant), example, dynamic_shapes=(lengths,))
    options: dict[str, bool | int] = {"cpp.dynamic_threads": True, "emulate_precision_casts": True}
    options["realize_opcount_threshold"] = 8  # else short kernels get pairs of vectors, at half the speed
    torch._inductor.aoti_compile_and_package(exported, package_path=str(file), inductor_configs=options)


@cache
def machine_features() -> str:
    """What a compiled kernel depends on besides its own code."""
    return f"{torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def source_code() -> str:
    return Path(elementwise.__file__).read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")


if __name__ == "__main__":
    compile_to(Variant.from_json(sys.argv[1]), Path(sys.argv[2]))
