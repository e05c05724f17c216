"""The tables of docs/how-to/memory-and-time.md: computed from the shapes of models and the rules of the bank.

Nothing here is measured on an accelerator.  What a device holds is decided by `device_capacity`, as in a search.
"""

from dataclasses import dataclass
from pathlib import Path

from tables import print_table

from evomerge.merge.bank.bank import LEAST_WINDOW
from evomerge.merge.bank.memory import SCRATCH, device_capacity

SOURCES = 3
TOKENS = 60_000  # of a trial: 4 tasks of 100 items of 150 tokens
MEASURED = 7.5  # seconds of a trial of SmolLM2-135M on one thread (docs/explanation/smollm2.md)
LINK = 32e9  # bytes a second of PCIe 4.0 x16


@dataclass(frozen=True)
class Size:
    """A Llama: vocabulary, hidden size, inner size, size of keys, layers, whether the head is the embedding."""

    name: str
    vocabulary: int
    hidden: int
    inner: int
    keys: int
    layers: int
    tied: bool

    @property
    def weights(self) -> int:
        """The number of weights."""
        h = self.hidden
        layer = 2 * h * h + 2 * self.keys * h + 3 * h * self.inner + 2 * h
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * h + h

    @property
    def largest(self) -> int:
        """The number of weights of the largest tensor."""
        return max(self.vocabulary, self.inner) * self.hidden

    @property
    def bytes(self) -> int:
        """In bfloat16."""
        return 2 * self.weights


SIZES = (
    Size("135M (SmolLM2)", 49152, 576, 1536, 192, 30, True),
    Size("1B (Llama 3.2)", 128256, 2048, 8192, 512, 16, True),
    Size("7B (Llama 2)", 32000, 4096, 11008, 4096, 32, False),
    Size("70B (Llama 3.1)", 128256, 8192, 28672, 1024, 80, False),
)


@dataclass(frozen=True)
class Device:
    """memory: bytes.  rate: bytes a second of its memory.  operations: bfloat16 a second, dense.  Data sheets."""

    name: str
    memory: float
    rate: float
    operations: float


DEVICES = (
    Device("24 GB (RTX 4090)", 24e9, 1.01e12, 165e12),
    Device("80 GB (H100 SXM)", 80e9, 3.35e12, 989e12),
    Device("141 GB (H200)", 141e9, 4.8e12, 989e12),
)


def room(size: Size, device: Device) -> tuple[bool, float]:
    """Whether a device can hold the live model, and how many models of base and sources stay on it as well."""
    window = max(LEAST_WINDOW, 2 * (1 + SOURCES) * 2 * size.largest)
    memory = int(device.memory)
    fits = device_capacity(memory, memory, size.bytes + window - SCRATCH, 1) >= SCRATCH
    return fits, min(1 + SOURCES, device_capacity(memory, memory, size.bytes + window, 1) / size.bytes)


def least_seconds(size: Size, device: Device, held: float) -> tuple[float, float]:
    """The least time of a candidate's merge and of its forwards: memory and units at the rates of the data sheet."""
    moved = (2 + SOURCES) * size.bytes / device.rate + (1 + SOURCES - held) * size.bytes / LINK
    return moved, 2 * size.weights * TOKENS / device.operations


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def seconds(time: float) -> str:
    if time < 90:
        return f"{time:.1g} s" if time < 1 else f"{time:.0f} s"
    return f"{time / 60:.0f} min" if time < 5400 else f"{time / 3600:.0f} h"


def draw(folder: Path | None = None) -> None:
    """Print the tables; there is no picture."""
    columns = (
        "weights",
        "a model in bfloat16",
        "disk: base, 3 sources, export",
        "live model",
        "memory of a CPU search",
    )
    rows: list[list[str]] = []
    for size in SIZES:
        live = f"{gigabytes(size.bytes)} or {gigabytes(2 * size.bytes)}"
        whole = gigabytes((1 + SOURCES) * size.bytes + 2 * size.bytes)
        disk = gigabytes((2 + SOURCES) * size.bytes)
        rows.append([size.name, f"{size.weights / 1e9:.3g} billion", gigabytes(size.bytes), disk, live, whole])
    print_table(["model", *columns], rows)
    rows = []
    for size in SIZES:
        cells = []
        for device in DEVICES:
            fits, held = room(size, device)
            if not fits:
                cells.append("does not fit")
                continue
            merge, forward = least_seconds(size, device, held)
            where = "all stay" if held == 1 + SOURCES else f"{held:.1f} of {1 + SOURCES} stay"
            cells.append(f"{where}; {seconds(merge)} + {seconds(forward)}")
        cpu = MEASURED * size.weights / SIZES[0].weights
        rows.append([size.name, seconds(cpu), *cells])
    print_table(["model", "one CPU thread", *(device.name for device in DEVICES)], rows)
