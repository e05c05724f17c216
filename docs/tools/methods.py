"""One picture for every merge method: what it does to two task vectors, computed by the package's own kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from svg import Axes, Picture
from torch import Tensor

from evomerge.merge.kernels.derived import derive
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.random_masks import mask_keys
from evomerge.merge.loose_tensors import measure_loose
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.plan import Derived, FisherBlend

LAYER = "model.layers.0.mlp.up_proj.weight"
GROUPS = (("both, same sign", 8), ("both, opposite signs", 8), ("only a", 4), ("only b", 4))
"""The elements of the two task vectors of `bars`, and how many there are of each kind."""


@dataclass
class Statistics:
    """Statistics of one tensor, as a statistics file holds them (`measure/statistics_file.py`)."""

    values: Tensor
    size: float = 1.0
    is_regmean: bool = False

    def covers(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return self.values

    def is_transposed(self, name: str) -> bool:
        return False


def merge(
    method: str, values: Mapping[str, Any], base: Tensor, sources: Sequence[Tensor], statistics: Sequence[Any] = ()
) -> Tensor:
    """The merged tensor, float32.

    values: of the method's coefficients; one number stands for all sources.  What is missing has its default.
    """
    knobs = METHODS[method].knobs
    given = {n: values.get(n, 1.0 if k.default is None else k.default) for n, k in knobs.items()}
    assert set(values) <= set(knobs), f"{method} has no {set(values) - set(knobs)}"
    count = len(sources)
    each = {n: tuple(np.broadcast_to(given[n], count).tolist()) for n, k in knobs.items() if k.each}
    shared = {n: float(given[n]) for n, k in knobs.items() if not k.each}
    keys = mask_keys(0, LAYER, [str(i) for i in range(count)])

    measured = measure_loose(base, sources, keys, statistics, LAYER)
    plan = METHODS[method].plan(Knobs(each, shared, count), measured)
    operands = derive(plan, LAYER, base, sources, statistics) if isinstance(plan, Derived) else sources
    planes = [s.read(LAYER) for s in statistics] if isinstance(plan, FisherBlend) else measured.planes(plan)
    out = torch.empty(base.shape)
    execute(plan, out, Operands(base, operands, planes, keys))
    return out


# --- Bars: the elements of two task vectors, for methods that look at single elements ---


@dataclass(frozen=True)
class Bars:
    """values: of the coefficients.  note: what they are, for the picture.  single: the method takes one source."""

    values: Mapping[str, Any]
    note: str
    single: bool = False


def two_task_vectors() -> tuple[Tensor, Tensor]:
    """(24,) each; the same in every picture.  Sizes differ within each group of GROUPS."""
    rng = np.random.default_rng(5)
    sizes = rng.uniform(0.1, 1.0, (2, 24))
    signs = np.where(rng.random(24) < 0.5, -1.0, 1.0)
    a, b = sizes * signs
    b[8:16] *= -1
    b[16:20] = 0
    a[20:] = 0
    return torch.tensor(a).float(), torch.tensor(b).float()


def bars(method: str, look: Bars) -> Picture:
    """Rows of bars: task vector a, task vector b, and what the method adds to the base."""
    a, b = two_task_vectors()
    base = torch.tensor(np.random.default_rng(6).normal(0, 1, 24)).float()
    shape = (3, 8)  # three rows of a matrix, for the methods that look at rows
    sources = [(base + d).view(shape) for d in ((a,) if look.single else (a, b))]
    added = (merge(method, look.values, base.view(shape), sources) - base.view(shape)).flatten()
    rows = [("a", a, "blue"), ("b", b, "orange"), ("result", added, "green")]
    if look.single:
        rows.pop(1)
    whole = a if look.single else a + b
    height = 40 + 74 * len(rows) + 26
    picture = Picture(640, height, f"{method}: the elements of the task vectors, and of the result minus the base")
    left, step = 70, 22.5
    for place, (name, count) in enumerate(() if look.single else GROUPS):
        start = sum(n for _, n in GROUPS[:place])
        x = left + step * start + 5 * place
        picture.text(x + step * count / 2, 16, name, "dim", "middle")
        picture.line([(x, 22), (x + step * count - 3, 22)], "frame")
    most = float(max(whole.abs().max(), added.abs().max(), a.abs().max(), b.abs().max()))
    for row, (name, values, colour) in enumerate(rows):
        middle = 30 + 74 * row + 37
        picture.text(left - 12, middle + 4, name, anchor="end")
        picture.line([(left, middle), (left + step * 24 + 15, middle)], "frame")
        xs = [left + step * place + 5 * ((place >= 8) + (place >= 16) + (place >= 20)) for place in range(24)]
        if name == "result":
            picture.columns(xs, middle, 16, (33 * whole / most).tolist(), "grey outline")
        picture.columns(xs, middle, 16, (33 * values / most).tolist(), f"{colour} bar")
    picture.text(left, height - 12, f"{look.note}; outline: {'a' if look.single else 'a + b'}", "dim")
    return picture


# --- The plane: whole tensors of two elements as points, for methods that blend tensors ---

BASE, A, B = (0.5, 0.4), (0.62, 1.5), (1.72, 0.66)


@dataclass(frozen=True)
class Plane:
    """values: of the coefficients at the result.  path: values on the way that is drawn.  note: what they are.

    centre: of the spheres that the method walks on: `origin`, `base` or none.
    sources: the points; by default A and B.
    statistics: of each source, with ellipses of equal loss around it.
    """

    values: Mapping[str, Any]
    note: str
    path: Sequence[Mapping[str, Any]] = ()
    centre: str = ""
    sources: Sequence[tuple[float, float]] = (A, B)
    statistics: Sequence[Statistics] = field(default_factory=tuple)


def plane(method: str, look: Plane) -> Picture:
    """Base, sources and result as points of a plane."""
    picture = Picture(440, 340, f"{method}: base, sources and result as points")
    axes = Axes(picture, (20, 12, 400, 290), (-0.08, 2.12), (-0.1, 1.7))
    base = torch.tensor([BASE])
    sources = [torch.tensor([s]) for s in look.sources]

    def at(values: Mapping[str, Any]) -> tuple[float, float]:
        x, y = merge(method, values, base, sources, look.statistics).flatten().tolist()
        return x, y

    scale = 400 / 2.2
    middle = {"origin": (0.0, 0.0), "base": BASE, "": None}[look.centre]
    if middle is not None:
        for point in look.sources:
            radius = float(np.hypot(point[0] - middle[0], point[1] - middle[1]))
            turns = np.linspace(-0.6, 1.9, 60)
            ring = [(middle[0] + radius * np.cos(t), middle[1] + radius * np.sin(t)) for t in turns]
            inside = [(x, y) for x, y in ring if axes.x[0] < x < axes.x[1] and axes.y[0] < y < axes.y[1]]
            picture.line((axes.place(x, y) for x, y in inside), "frame dash")
    for point, statistic, colour in zip(look.sources, look.statistics, ("blue", "orange"), strict=False):
        sizes, turn = ellipse(statistic)
        for level in (0.16, 0.32):
            radii = (level * scale * sizes[0], level * scale * sizes[1])
            picture.ellipse(*axes.place(*point), radii, turn, f"{colour} outline")
    for point, colour in zip(look.sources, ("blue", "orange", "purple"), strict=False):
        axes.line([BASE[0], point[0]], [BASE[1], point[1]], f"{colour} dash")
    if look.path:
        axes.line(*zip(*map(at, look.path), strict=True), "green")
    names = ["A", "B"] if len(sources) <= 2 else ["oldest", "middle", "newest"]
    marks = [((0.0, 0.0), "0", "grey"), (BASE, "base", "grey")]
    marks += [(s, n, c) for s, n, c in zip(look.sources, names, ("blue", "orange", "purple"), strict=False)]
    marks.append((at(look.values), "result", "green"))
    for (x, y), name, colour in marks:
        axes.dots([x], [y], colour, 6 if name == "result" else 4.5)
        across, down = axes.place(x, y)
        if name == "base":
            picture.text(across - 8, down + 15, name, anchor="end")
        else:
            picture.text(across + 9, down + (14 if name == "result" else -7), name)
    picture.text(20, 325, look.note, "dim")
    return picture


def ellipse(statistic: Statistics) -> tuple[tuple[float, float], float]:
    """Half axes of the points at loss 1 around a source, and the turn in degrees of the first one (SVG's direction)."""
    values = statistic.values.double()
    matrix = values if statistic.is_regmean else torch.diag(values.flatten())
    sizes, directions = torch.linalg.eigh(matrix)
    turn = -np.degrees(np.arctan2(float(directions[1, 0]), float(directions[0, 0])))
    return (float(sizes[0] ** -0.5), float(sizes[1] ** -0.5)), float(turn)


# --- Singular values, for methods that look at whole matrices ---


@dataclass(frozen=True)
class Spectrum:
    """note: below the picture."""

    note: str


def spectrum(method: str, look: Spectrum) -> Picture:
    """The singular values of two task vectors, of their sum and of what the method adds to the base."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
    other = np.linalg.qr(left[:, :1] * 2 + rng.normal(size=(8, 8)) * 0.35)[0]
    sizes = np.array([3.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03])
    a = left @ np.diag(sizes) @ right
    b = other @ np.diag(sizes) @ np.vstack([right[:1], np.linalg.qr(rng.normal(size=(8, 8)))[0][1:]])
    base = torch.zeros(8, 8)
    tensors = [torch.tensor(a).float(), torch.tensor(b).float()]
    found = {
        "task vector a": (a, "blue"),
        "task vector b": (b, "orange"),
        "a + b": (a + b, "grey"),
        "result": (merge(method, {}, base, tensors).double().numpy(), "green"),
    }
    picture = Picture(640, 200, f"{method}: singular values of the task vectors and of the result")
    for number, (name, (matrix, colour)) in enumerate(found.items()):
        axes = Axes(picture, (40 + 150 * number, 30, 130, 120), (0, 8), (0, 6.4))
        picture.text(105 + 150 * number, 20, name, anchor="middle")
        if number == 0:
            axes.y_ticks((v, str(v)) for v in (0, 2, 4, 6))
        for place, size in enumerate(np.linalg.svd(matrix, compute_uv=False)):
            axes.bar((place + 0.15, place + 0.85), (0, size), f"{colour} bar")
    picture.text(40, 185, look.note, "dim")
    return picture


# --- What each picture shows ---

T = np.linspace(0, 1, 25).tolist()
BY_WEIGHT = [{"weight": [1 - t, t]} for t in T]

LOOKS: dict[str, Plane | Bars | Spectrum] = {
    "linear": Plane({"weight": [0.5, 0.5]}, "line: weights from (1, 0) to (0, 1); result: equal weights", BY_WEIGHT),
    "uniform_soup": Plane({}, "no coefficient: the mean of A and B"),
    "checkpoint_average": Plane(
        {"decay": 1.0},
        "line: decay from 1 (result) down to 0.05",
        [{"decay": d} for d in np.geomspace(1, 0.05, 25)],
        sources=((0.62, 1.5), (1.35, 1.3), (1.72, 0.66)),
    ),
    "slerp": Plane({"t": 0.5}, "line: t from 0 to 1; result: t = 0.5", [{"t": t} for t in T], centre="origin"),
    "nuslerp": Plane({"weight": [0.5, 0.5]}, "line: weights from (1, 0) to (0, 1)", BY_WEIGHT, centre="base"),
    "multislerp": Plane({"weight": [0.5, 0.5]}, "line: weights from (1, 0) to (0, 1)", BY_WEIGHT, centre="base"),
    "karcher": Plane({}, "no coefficient: half of the angle, mean of the lengths", centre="origin"),
    "model_stock": Plane({}, "no coefficient: the angle of the task vectors decides"),
    "passthrough": Plane(
        {"scale": 1.0}, "line: scale from 0.5 to 1.1; result: 1", [{"scale": 0.5 + 0.6 * t} for t in T], sources=(A,)
    ),
    "task_arithmetic": Plane(
        {"weight": 0.6},
        "line: both weights from 0 to 0.75; result: 0.6",
        [{"weight": 0.75 * t} for t in T],
    ),
    "fisher": Plane(
        {},
        "ellipses: equal loss by each source's Fisher information",
        statistics=[Statistics(torch.tensor([[0.5, 8.0]])), Statistics(torch.tensor([[6.0, 0.6]]))],
    ),
    "regmean": Plane(
        {"alpha": 1.0},
        "ellipses: equal error on each source's inputs; alpha = 1",
        statistics=[
            Statistics(torch.tensor([[1.0, 1.1], [1.1, 6.0]]).double(), is_regmean=True),
            Statistics(torch.tensor([[5.0, -1.4], [-1.4, 1.0]]).double(), is_regmean=True),
        ],
    ),
    "nearswap": Bars({"t": 0.5}, "t = 0.5", single=True),
    "ties": Bars({"density": 0.5}, "density 0.5, weights 1, normalize"),
    "dare_linear": Bars({"density": 0.7}, "density 0.7, weights 1"),
    "dare_ties": Bars({"density": 0.7}, "density 0.7, weights 1"),
    "della_linear": Bars({"density": 0.7, "epsilon": 0.3}, "density 0.7, epsilon 0.3, weights 1"),
    "della": Bars({"density": 0.7, "epsilon": 0.3}, "density 0.7, epsilon 0.3, weights 1, normalize"),
    "breadcrumbs": Bars({"density": 0.5, "gamma": 0.13}, "density 0.5, gamma 0.13, weights 1"),
    "breadcrumbs_ties": Bars({"density": 0.5, "gamma": 0.13}, "density 0.5, gamma 0.13, weights 1"),
    "sce": Bars({"select_topk": 0.5}, "select_topk 0.5"),
    "arcee_fusion": Bars({}, "no coefficient; the 24 elements are three rows of 8", single=True),
    "ram": Bars({}, "epsilon 1e-5"),
    "ramplus_tl": Bars({"r": 0.5, "alpha": 1.0}, "epsilon 1e-5, r 0.5, alpha 1"),
    "tsv": Spectrum("matrices of 8 x 8; a and b share their strongest direction; weights 1"),
    "iso_c": Spectrum("matrices of 8 x 8; a and b share their strongest direction; lambda 1"),
}
DRAW = {Plane: plane, Bars: bars, Spectrum: spectrum}


def draw(folder: Path) -> None:
    """Write one file for each method."""
    assert set(LOOKS) == set(METHODS), set(LOOKS) ^ set(METHODS)
    for method, look in LOOKS.items():
        DRAW[type(look)](method, look).save(folder / f"{method}.svg")  # type: ignore[operator]
