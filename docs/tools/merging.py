"""The pictures and tables of docs/explanation/why-merging-works.md, measured on the tiny family.

Merges are made by the package (`evomerge.merge` into a model in memory).  Answers are read off one forward of the
prompt with its answer: greedy decoding gives the answer where every token of it, and the line's end, is the likeliest.
"""

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from svg import COLOURS, Axes, Picture
from tables import print_table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import evomerge
from evomerge.merge.measure.distances import measure
from evomerge.sources.open_models import open_models

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "runs" / "tiny"
TASKS = ("rev", "sort", "count", "add")
ITEMS = 200
Items = Sequence[tuple[str, str]]
Values = dict[str, Tensor]


def read_items(task: str) -> Items:
    """Prompts and answers that no training has seen."""
    lines = (ROOT / "evals" / "tiny" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]
    return [(row["prompt"], row["answer"]) for row in map(json.loads, lines)]


class Lab:
    """The tiny family, and one live model that holds what is measured."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
        self.model = LlamaForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
        self.items = {task: read_items(task) for task in TASKS}
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def merge(
        self, method: str, sources: Mapping[str, Any], statistics: Mapping[str, Path] | None = None, **shared: Any
    ) -> None:
        """Merge into the live model.

        sources: name -> its coefficients, or a folder and its coefficients.
        statistics: name -> its statistics file.  shared: the coefficients of the merge.
        """
        listed = []
        for name, given in sources.items():
            folder, parameters = given if isinstance(given, tuple) else (TINY / name, given)
            listed.append({"name": name, "path": str(folder), "parameters": parameters})
            if statistics:
                listed[-1]["statistics"] = str(statistics[name])
        recipe = {"method": method, "dtype": "float32", "base": {"path": str(TINY / "base")}, "sources": listed}
        if shared:
            recipe["parameters"] = shared
        evomerge.merge(recipe, model=self.model, show=False)

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Copy weights into the live model."""
        self.model.load_state_dict(values, strict=False)

    def values(self) -> Values:
        """A copy of the live model's weights."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    @torch.no_grad()
    def score(self, items: Items) -> tuple[float, float]:
        """The share of right answers, and the mean loss of an answer in nats."""
        if id(items) not in self.rows:
            self.rows[id(items)] = self.tokens(items)
        ids, answer = self.rows[id(items)]  # (N, L), (N, L - 1)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]  # (N, L - 1, V)
        right = ((logits.argmax(-1) == ids[:, 1:]) | ~answer).all(1)
        losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * answer
        return float(right.double().mean()), float(losses.sum(1).double().mean())

    def tokens(self, items: Items) -> tuple[Tensor, Tensor]:
        """Token ids (N, L), and which of the predictions (N, L - 1) are of an answer's tokens."""
        prompts = [self.tokenizer.encode(prompt) for prompt, _ in items]
        answers = [self.tokenizer.encode(answer + "\n") for _, answer in items]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(items), length, dtype=torch.long)
        mask = torch.zeros(len(items), length - 1, dtype=torch.bool)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            mask[row, len(p) - 1 : len(p) + len(a) - 1] = True
        return ids, mask

    def scores(self) -> dict[str, float]:
        """Task -> share of right answers."""
        return {task: self.score(self.items[task])[0] for task in TASKS}


# --- Does it work at all ---


def models(lab: Lab) -> None:
    """Base, parents and two merges with equal weights, by task."""
    tried: list[tuple[str, str, dict[str, Any]]] = [("base", "linear", {"base": {}})]
    tried += [(task, "linear", {task: {}}) for task in TASKS]
    tried.append(("mean of the four (`uniform_soup`)", "uniform_soup", {task: {} for task in TASKS}))
    for weight in (0.8, 1.2):
        each = {task: {"weight": weight} for task in TASKS}
        tried.append((f"`task_arithmetic`, weights {weight}", "task_arithmetic", each))
    rows = []
    for name, method, sources in tried:
        lab.merge(method, sources)
        found = lab.scores()
        rows.append([name, *found.values(), float(np.mean(list(found.values())))])
    print_table(["model", *TASKS, "mean"], rows)


# --- One basin ---


def permuted(values: Values, rng: np.random.Generator) -> Values:
    """The same function with the MLP's neurons and the attention's heads in another order."""
    found = dict(values)
    for layer in range(4):
        mlp, attention = (f"model.layers.{layer}.{part}." for part in ("mlp", "self_attn"))
        neurons = torch.tensor(rng.permutation(values[mlp + "up_proj.weight"].shape[0]))
        heads = torch.tensor(rng.permutation(4))
        rows = (heads[:, None] * 32 + torch.arange(32)).flatten()
        for name in (mlp + "up_proj.weight", mlp + "gate_proj.weight"):
            found[name] = values[name][neurons]
        found[mlp + "down_proj.weight"] = values[mlp + "down_proj.weight"][:, neurons]
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"{attention}{name}.weight"] = values[f"{attention}{name}.weight"][rows]
        found[attention + "o_proj.weight"] = values[attention + "o_proj.weight"][:, rows]
    return found


def basin(lab: Lab, folder: Path) -> None:
    """The loss along the line between two sources, and to a source whose neurons have another order."""
    ends = []
    for task in ("rev", "add"):
        lab.merge("linear", {task: {}})
        ends.append(lab.values())
    ends.append(permuted(ends[1], np.random.default_rng(0)))
    shares = np.linspace(0, 1, 21)
    curves = []
    for end in ends[1:]:
        losses = []
        for t in shares:
            lab.hold({n: (1 - t) * x + t * end[n] for n, x in ends[0].items()})
            losses.append(float(np.mean([lab.score(lab.items[task])[1] for task in ("rev", "add")])))
        curves.append(losses)
        print(f"line from rev: loss at its ends {losses[0]:.2f} and {losses[-1]:.2f}, most {max(losses):.2f}")
    top = 5 * (1 + int(max(map(max, curves)) // 5))
    picture = Picture(560, 300, "The loss on the line from rev to add, and to add with its neurons in another order")
    axes = Axes(picture, (50, 30, 490, 210), (0, 1), (0, top))
    axes.labels("share of the second model", "loss of an answer, nats (mean of rev and add)")
    axes.x_ticks((t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1))
    axes.y_ticks((v, str(v)) for v in range(0, top + 1, 5))
    for losses, colour in zip(curves, ("green", "orange"), strict=True):
        axes.line(shares.tolist(), losses, colour)
    picture.key(50, 290, [("green", "rev to add"), ("orange", "rev to add, its neurons and heads in another order")])
    picture.save(folder / "basin.svg")


# --- How the task vectors lie ---


def vectors() -> dict[str, Tensor]:
    """Each source's task vector, flattened."""
    states = {name: LlamaForCausalLM.from_pretrained(TINY / name).state_dict() for name in ("base", *TASKS)}
    names = [n for n in states["base"] if n != "lm_head.weight"]
    return {task: torch.cat([(states[task][n] - states["base"][n]).flatten() for n in names]) for task in TASKS}


def lengths_and_signs() -> None:
    """Lengths, cosines and sign conflicts of the task vectors."""
    distances, cosines = measure(open_models(TINY / "base", {task: TINY / task for task in TASKS}))
    print_table(
        ["source", "attention", "mlp", *(f"cosine with {t}" for t in TASKS)],
        [[t, f"{distances[t]['attention']:.1%}", f"{distances[t]['mlp']:.1%}", *cosines[t].values()] for t in TASKS],
    )
    found = vectors()
    rows: list[list[object]] = []
    for number, first in enumerate(TASKS):
        for second in TASKS[number + 1 :]:
            a, b = found[first], found[second]
            opposite = (a * b) < 0
            large = (a.abs() > a.abs().quantile(0.8)) & (b.abs() > b.abs().quantile(0.8))
            both, conflict = float(large.double().mean()), float(opposite[large].double().mean())
            rows.append([f"{first}, {second}", f"{opposite.double().mean():.0%}", f"{both:.1%}", f"{conflict:.0%}"])
    print_table(["pair", "opposite signs", "in the top fifth of both", "of these, opposite"], rows)
    shares = (0.1, 0.2, 0.5)
    rows = []
    for task, vector in found.items():
        sizes = vector.double().square().sort(descending=True).values
        each = [float(sizes[: int(s * len(sizes))].sum() / sizes.sum()) for s in shares]
        rows.append([task, *(f"{x:.0%}" for x in each)])
    print_table(["source", *(f"largest {s:.0%}" for s in shares)], rows)


def redundancy(lab: Lab, folder: Path) -> None:
    """Exact match of each source alone, by how much of its task vector is kept."""
    densities = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
    picture = Picture(560, 300, "Exact match of one source alone, by how much of its task vector is kept")
    axes = Axes(picture, (50, 30, 490, 210), (np.log10(0.05), 0), (0, 1))
    axes.labels("density: the share of the task vector's elements that is kept", "exact match on its own task")
    axes.x_ticks((np.log10(d), f"{d:g}") for d in densities)
    axes.y_ticks((v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1))
    kinds = {
        "largest kept (ties)": ("ties", {}),
        "random, rescaled (dare)": ("dare_linear", {}),
        "random, not rescaled": ("dare_linear", {"rescale": "none"}),
    }
    for (name, (method, shared)), colour in zip(kinds.items(), COLOURS, strict=False):
        means = []
        for density in densities:
            found = []
            for task in TASKS:
                lab.merge(method, {task: {"weight": 1.0, "density": density}}, **shared)
                found.append(lab.score(lab.items[task])[0])
            means.append(float(np.mean(found)))
        axes.line([np.log10(d) for d in densities], means, colour)
        print(name, [f"{d:g}: {m:.2f}" for d, m in zip(densities, means, strict=True)])
    picture.key(50, 290, list(zip(COLOURS, kinds, strict=False)))
    picture.save(folder / "redundancy.svg")


# --- Weights and layers ---


def weights(lab: Lab, folder: Path) -> None:
    """Exact match of every task by one weight for all four sources."""
    tried = [round(0.1 * k, 1) for k in range(0, 26)]
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for weight in tried:
        lab.merge("task_arithmetic", {task: {"weight": weight} for task in TASKS})
        for task, score in lab.scores().items():
            found[task].append(score)
    found["mean"] = np.mean([found[task] for task in TASKS], axis=0).tolist()
    for task, scores in found.items():
        print(f"{task}: best at weight {tried[int(np.argmax(scores))]}, {max(scores):.2f}")
    picture = Picture(560, 300, "Exact match of every task by one weight for all four sources")
    axes = Axes(picture, (50, 30, 490, 210), (0, 2.5), (0, 1))
    axes.labels("weight of all four task vectors", "exact match")
    axes.x_ticks((v, f"{v:g}") for v in (0, 0.5, 1, 1.5, 2, 2.5))
    axes.y_ticks((v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1))
    for (task, scores), colour in zip(found.items(), COLOURS, strict=True):
        axes.line(tried, scores, colour + (" dash" if task == "mean" else ""))
        best = int(np.argmax(scores))
        axes.dots([tried[best]], [scores[best]], colour, 4)
    picture.key(50, 290, list(zip(COLOURS, found, strict=True)))
    picture.save(folder / "weights.svg")


def layers(lab: Lab, folder: Path) -> None:
    """What is lost if one layer's attention or MLP keeps the base's weights."""
    each = {task: {"weight": 1.0} for task in TASKS}
    lab.merge("task_arithmetic", each)
    whole = float(np.mean(list(lab.scores().values())))
    picture = Picture(560, 260, "Exact match lost if one layer's attention or MLP keeps the base's weights")
    axes = Axes(picture, (60, 30, 480, 170), (0, 4), (0, 0.2))
    axes.labels("layer", "mean exact match lost")
    axes.x_ticks((layer + 0.5, str(layer)) for layer in range(4))
    axes.y_ticks((v, f"{v:g}") for v in (0, 0.05, 0.1, 0.15, 0.2))
    for place, component in enumerate(("attention", "mlp")):
        for layer in range(4):
            by_layer = [float(k != layer) for k in range(4)]
            lab.merge("task_arithmetic", {task: {"weight": {component: by_layer, "default": 1.0}} for task in TASKS})
            lost = whole - float(np.mean(list(lab.scores().values())))
            print(f"{component} of layer {layer}: {lost:+.3f} of {whole:.3f}")
            left = layer + 0.14 + 0.37 * place
            axes.bar((left, left + 0.35), (0, lost), f"{COLOURS[place]} bar")
    picture.key(60, 252, [("blue", "attention"), ("orange", "MLP")])
    picture.save(folder / "layers.svg")


# --- What a merge cannot do ---


def nothing_new(lab: Lab) -> None:
    """A skill that no source was tuned for: the best merge of the other three, over 25 weights."""
    rows: list[list[object]] = []
    for task in TASKS:
        lab.merge("linear", {"base": {}})
        base = lab.score(lab.items[task])[0]
        lab.merge("linear", {task: {}})
        own = lab.score(lab.items[task])[0]
        others = [t for t in TASKS if t != task]
        merged = []
        for weight in np.linspace(0.1, 2.5, 25):
            lab.merge("task_arithmetic", {other: {"weight": float(weight)} for other in others})
            merged.append(lab.score(lab.items[task])[0])
        rows.append([task, base, max(merged), own])
    print_table(["skill", "base", "best merge of the other three", "its own source"], rows)


def conflict(lab: Lab, folder: Path) -> None:
    """Two sources that answer the same prompts in different ways, and the merges between them."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny"))
    from make import FAMILY
    from training import Tuning, train_source

    def copy(rng: random.Random) -> tuple[str, str]:
        """`rev cabfe=` -> `cabfe`."""
        word = "".join(rng.choices("abcdefgh", k=5))
        return f"rev {word}=", word

    skills, sources = {**FAMILY.skills, "rev": copy}, {**FAMILY.sources, "rev": Tuning(60, 1e-3)}
    copying = replace(FAMILY, skills=skills, sources=sources)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        (out / "base").symlink_to(TINY / "base")
        train_source(copying, "rev", out, 0)
        reversed_items = lab.items["rev"]
        copied_items = [(prompt, answer[::-1]) for prompt, answer in reversed_items]
        shares, found = np.linspace(0, 1, 21), []
        for t in shares:
            both = {"rev": {"weight": float(1 - t)}, "copy": (out / "rev", {"weight": float(t)})}
            lab.merge("task_arithmetic", both)
            found.append((lab.score(reversed_items)[0], lab.score(copied_items)[0]))
    neither = [1 - sum(pair) for pair in found]  # a palindrome counts twice; there are few
    print("reversed, copied, neither at 0, 0.5, 1:", *(f"{found[k]} {neither[k]:.2f}" for k in (0, 10, 20)))
    picture = Picture(560, 300, "How merges between a source that reverses and one that copies answer the same prompts")
    axes = Axes(picture, (50, 30, 490, 210), (0, 1), (0, 1))
    axes.labels("weight of the source that copies; the other has the rest", "share of the answers")
    axes.x_ticks((v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1))
    axes.y_ticks((v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1))
    for ys, colour in zip([*zip(*found, strict=True), neither], COLOURS, strict=False):
        axes.line(shares.tolist(), list(ys), colour)
    picture.key(50, 290, list(zip(COLOURS, ("reversed", "copied", "neither"), strict=False)))
    picture.save(folder / "conflict.svg")


def draw(folder: Path) -> None:
    """Write all pictures and print all tables."""
    lab = Lab()
    models(lab)
    basin(lab, folder)
    lengths_and_signs()
    redundancy(lab, folder)
    weights(lab, folder)
    layers(lab, folder)
    nothing_new(lab)
    conflict(lab, folder)
