"""Smooth models of two families, on which benchmarks/samplers.py searches for nothing.

Models at random points are scored by every item once.  Then the objective and the margin of each item (an answer is
right if its margin is positive) are fitted by kernel ridge regression.  A point has 240 weights: 4 sources by 60 parts
of the model.  Smaller spaces tie parts together.

tiny   held whole in float32.  Parts: the halves of each matrix, and the norms of each half of the depth.  Tied
       together: all (4 coefficients), by kind (12), by kind and half of the depth (24), by kind and layer (48), by
       piece of attention or MLP and layer (96).
real   a model with 30 layers, such as SmolLM2-135M; sources change its attention and MLP.  Each point is merged and
       scored in the family's own type.  Parts: attention and MLP of each layer.  Tied together: all (4), by kind (8),
       by kind and so many parts of the depth: 3 (24), 12 (96).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from results import ROOT

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig

if TYPE_CHECKING:
    from small_family import Answers
    from torch import Tensor

Vector = NDArray[np.float64]
TASKS, SOURCES, PARTS = 4, 4, 60
LAYERS = PARTS // 2  # of a real model
TINY, REAL = (4, 12, 24, 48, 96, 240), (4, 8, 24, 96)  # coefficients of the spaces
SPLITS = {False: (60, 100), True: (16, 20)}  # search and holdout items of each task; by whether the family is real
POINTS = {False: 490, True: 173}
RIDGE = {False: 3e-3, True: 3e-2}  # of the regression
SAVED = 10  # points, after which the file is written
PIECES = {"q_proj": 0, "k_proj": 0, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
HIGH = 2.0  # bound of a weight
MARGIN = 8.0  # beyond it a margin says no more


class Scored(NamedTuple):
    """A family whose models can be scored at any point.

    groups: the group of each part, (PARTS,), by the number of coefficients.
    sizes: (240,) of the change that each weight scales.
    scores: (240,) weights -> (2, items) objectives and margins of the model.
    """

    groups: dict[int, NDArray[np.int64]]
    sizes: Vector
    scores: Callable[[Vector], Vector]


# --- The parts of the model ---


def parts_of(names: Sequence[str], rows: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """The part of each row of each tensor, by the tensor's name: 56 halves of matrices, 2 of the embedding, 2 norms."""
    found, count = {}, 0
    for name in names:
        halves = (np.arange(rows[name]) >= rows[name] / 2).astype(np.int64)
        if "norm" in name:
            late = name == "model.norm.weight" or int(name.split(".")[2]) >= 2
            found[name] = np.full(rows[name], PARTS - 2 + late)
        else:
            found[name], count = count + halves, count + 2
    assert count == PARTS - 2
    return found


def groups_of(names: Sequence[str], dimensions: int) -> NDArray[np.int64]:
    """The group of each part, (PARTS,), in a space of so many coefficients."""
    places = []  # (kind, piece, depth) of every part
    for name in (n for n in names if "norm" not in n):
        if name == "model.embed_tokens.weight":
            places += [(2, 5, 0), (2, 5, 3)]
        else:
            _, _, layer, block, matrix, _ = name.split(".")
            places += [(int(block == "mlp"), PIECES[matrix], int(layer))] * 2
    places += [(3, 6, 0), (3, 6, 3)]
    if dimensions == SOURCES * PARTS:
        return np.arange(PARTS)
    keys: list[tuple[int, ...]] = {
        4: [(0,) for _ in places],
        12: [(min(kind, 2),) for kind, _, _ in places],
        24: [(min(kind, 2), depth // 2) for kind, _, depth in places],
        48: [(kind, depth) for kind, _, depth in places],
        96: [(piece, depth) for _, piece, depth in places],
    }[dimensions]
    return np.unique(np.array(keys), axis=0, return_inverse=True)[1].reshape(-1)


def axis_groups(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(240,) the coefficient of each weight, by the group of each part."""
    count = int(parts.max()) + 1
    return np.concatenate([source * count + parts for source in range(SOURCES)])


def layer_groups(dimensions: int) -> NDArray[np.int64]:
    """The same of a real model, whose parts are the attention of each layer and then the MLP of each layer."""
    depths = {4: 1, 8: 1, 24: 3, 96: 12}[dimensions]
    depth = np.arange(LAYERS) * depths // LAYERS
    return np.concatenate([depth, depth if dimensions == SOURCES else depth + depths])


# --- Scoring models ---


def tiny_family(path: Path) -> Scored:
    """The tiny family, by plain torch."""
    import torch
    from small_family import SmallFamily

    family = SmallFamily(family_config(path, real=False))
    rows = {n: len(b) for n, b in zip(family.names, family.base, strict=True)}
    parts = parts_of(family.names, rows)
    where = {n: torch.tensor(parts[n]) for n in family.names}
    sizes = np.zeros((SOURCES, PARTS))
    for name, change in zip(family.names, family.changes, strict=True):
        squares = change.reshape(SOURCES, rows[name], -1).double().pow(2).sum(2).numpy()
        for source in range(SOURCES):
            sizes[source] += np.bincount(parts[name], squares[source], PARTS)

    def scores(weights: Vector) -> Vector:
        each = torch.tensor(weights.reshape(SOURCES, PARTS)).float()
        values = {}
        for name, base, change in zip(family.names, family.base, family.changes, strict=True):
            rates = each[:, where[name]].view(SOURCES, rows[name], *[1] * (base.ndim - 1))
            values[name] = base + (rates * change).sum(0)
        return objectives_and_margins(list(family.score(values, "search").values()))

    return Scored({d: groups_of(family.names, d) for d in TINY}, sizes.reshape(-1) ** 0.5, scores)


def real_family(path: Path) -> Scored:
    """A real family: each model merged by evomerge, and scored by plain torch in the type of the configuration."""
    from real_family import RealFamily

    family = RealFamily(family_config(path, real=True))
    return Scored(
        {d: layer_groups(d) for d in REAL},
        family.sizes(),
        lambda weights: objectives_and_margins(family.answers_at(weights)),
    )


def family_config(path: Path, real: bool) -> SearchConfig:
    """The configuration of a family with the items of the surrogate as search items."""
    from small_family import with_changes

    splits = {"search": sum(SPLITS[real]), "selection": 20, "holdout": 20}
    space = {"space": {"granularity": "layer", "components": ["attention", "mlp"], "weight": [0.0, HIGH]}}
    return with_changes(load_config(path), splits=splits, seed=0, **(space if real else {}))


def objectives_and_margins(answers: "Sequence[Answers]") -> Vector:
    """(2, items) the objective `auto` and the margin of every item.  answers: of each task."""
    import torch
    from objectives import CANDIDATES, choice_margin

    def margins(a: "Answers") -> "Tensor":
        smallest = a.margins.masked_fill(~a.mask, MARGIN).amin(1) if a.choices is None else choice_margin(a)
        return smallest.clamp(-MARGIN, MARGIN)

    objective = CANDIDATES["mean and weakest -6"]
    both = [torch.cat([objective(a) for a in answers]), torch.cat([margins(a) for a in answers])]
    return np.stack([values.numpy() for values in both]).astype(float)


def add_family(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a family and its surrogate."""
    parser.add_argument("--surrogate", type=Path, default=Path("runs/surrogate.npz"), help="made if it is not there")
    parser.add_argument("--family", type=Path, default=ROOT / "benchmarks" / "tiny24.yaml", help="configuration")
    parser.add_argument("--real", action="store_true", help="the family is of a model of real size")


# --- Fitting ---


def fit(path: Path, config: Path, real: bool, points: int) -> None:
    """Score models at random points, and write what the surrogate needs; go on where the file ends.

    path: of the file.  config: of the family.
    """
    known = np.load(path)["scores"] if path.is_file() else np.zeros((0, 2, 0))
    given = list(given_points().values())
    if len(known) >= len(given) + points:
        return
    family = real_family(config) if real else tiny_family(config)
    rng = np.random.default_rng(0)
    chosen = np.array([*given, *(random_point(rng, family.groups, kind) for kind in range(points))])
    found = list(known)
    for point in chosen[len(known) :]:
        found.append(family.scores(point))
        if len(found) % SAVED == 0 or len(found) == len(chosen):
            spaces = {f"groups{d}": groups for d, groups in family.groups.items()}
            scores = {"points": chosen[: len(found)], "scores": np.array(found), "searched": SPLITS[real][0]}
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **scores, sizes=family.sizes, **spaces)
    print(f"{len(found)} points; {Surrogate(path).quality()}", flush=True)


def given_points() -> dict[str, Vector]:
    """Name -> (240,) weights: the base, the sources, their means."""
    sources = {f"source {s}": np.repeat(np.eye(SOURCES)[s], PARTS) for s in range(SOURCES)}
    means = {f"all at {w:g}": np.full(SOURCES * PARTS, w) for w in (0.0, 0.25, 0.5)}
    return means | sources


def random_point(rng: np.random.Generator, spaces: Mapping[int, NDArray[np.int64]], number: int) -> Vector:
    """(240,) weights: coarse or fine, anywhere or near weights that are equal within a source.

    spaces: the groups of the parts by the number of coefficients.
    """
    groups = axis_groups(spaces[sorted(spaces)[number % len(spaces)]])
    anywhere = rng.uniform(0, HIGH, groups.max() + 1)[groups]
    if rng.random() < 0.3:
        return anywhere * rng.random() ** 0.5
    centre = rng.uniform(0.1, 1.0, SOURCES).repeat(PARTS)
    return np.clip(centre + rng.uniform(0.1, 0.8) * (anywhere - HIGH / 2), 0, HIGH)


def gaussian(left: Vector, right: Vector, width: float) -> Vector:
    """(n, N) of the distances between (n, d) and (N, d)."""
    squares: Vector = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.exp(-squares / (2 * width**2))


class Surrogate:
    """A smooth model of a family: objective and margin of each item at any of the points, by kernel regression.

    The kernel is the sum of a Gaussian of the 24 groups' means and a Gaussian of all weights; a weight counts by the
    size of the change that it scales.
    """

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        self.searched = int(stored.get("searched", SPLITS[False][0]))  # search items of each task
        dimensions = sorted(int(name.removeprefix("groups")) for name in stored if name.startswith("groups"))
        self.sizes = stored["sizes"] / np.sqrt(np.mean(stored["sizes"] ** 2))
        self.groups = {d: axis_groups(stored[f"groups{d}"]) for d in dimensions}
        middle = np.zeros((24, SOURCES * PARTS))
        middle[self.groups[24], np.arange(SOURCES * PARTS)] = self.sizes**2
        self.middle = middle / middle.sum(1, keepdims=True)
        self.items = stored["scores"].shape[2] // TASKS  # of each task
        self.points, self.scores = stored["points"], stored["scores"]  # (N, 240), (N, 2, items)
        self.coarse, self.fine = self.points @ self.middle.T, self.points * self.sizes
        self.widths, self.ridge = (2.0, 20.0), RIDGE[dimensions == sorted(REAL)]
        self.fit(np.arange(len(self.points)))

    def kernel(self, points: Vector) -> tuple[Vector, Vector]:
        """(n, N) of the groups' means, (n, N) of all weights, by the points of the fit."""
        near = gaussian(points @ self.middle.T, self.coarse, self.widths[0])
        return near, gaussian(points * self.sizes, self.fine, self.widths[1])

    def fit(self, rows: NDArray[np.int64]) -> None:
        """Fit the scores at some points."""
        kernel = sum(self.kernel(self.points[rows]))[:, rows]
        flat = self.scores[rows].reshape(len(rows), -1)
        self.mean = flat.mean(0)
        solved = np.linalg.solve(kernel + self.ridge * np.eye(len(rows)), flat - self.mean)
        self.weights = np.zeros((len(self.points), flat.shape[1]))  # (N, 2 items)
        self.weights[rows] = solved

    def at(self, point: Vector) -> tuple[Vector, Vector]:
        """Objectives and margins of all items at a point, each (items,)."""
        flat = self.mean + sum(self.kernel(point[None]))[0] @ self.weights
        return tuple(flat.reshape(2, -1))

    def gradient(self, point: Vector, items: Vector) -> Vector:
        """(240,) the derivative of a weighted sum of objectives.  items: (items,) their weights."""
        near, wide = (k[0] for k in self.kernel(point[None]))
        pull = self.weights[:, : len(items)] @ items  # (N,)
        coarse = ((near * pull) @ (self.coarse - point @ self.middle.T)) / self.widths[0] ** 2
        fine = ((wide * pull) @ (self.fine - point * self.sizes)) / self.widths[1] ** 2
        return coarse @ self.middle + fine * self.sizes

    def quality(self) -> str:
        """How well the fit of four fifths of the points foretells the rest."""
        held = np.arange(len(self.points)) % 5 == 4
        self.fit(np.flatnonzero(~held))
        guessed = np.array([np.stack(self.at(p)) for p in self.points[held]])
        real = self.scores[held]
        self.fit(np.arange(len(self.points)))
        parts = [1 - ((guessed - real)[:, k] ** 2).mean() / real[:, k].var(0).mean() for k in (0, 1)]
        means = np.corrcoef(guessed[:, 0].mean(1), real[:, 0].mean(1))[0, 1]
        right = np.corrcoef((guessed[:, 1] > 0).mean(1), (real[:, 1] > 0).mean(1))[0, 1]
        return (
            f"held-out points: {parts[0]:.2f} of the variance of an item's objective, {parts[1]:.2f} of its margin; "
            f"correlation of the mean objective {means:.3f}, of the exact match {right:.3f}"
        )
