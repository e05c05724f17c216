"""Gather statistics of a source on its own items: squared gradients for `fisher`, input Gram matrices for `regmean`.

The Fisher information is the empirical one: from gradients of the log-likelihood of the gold answer, not of answers
drawn from the model.  It needs no sampling, so the same items give the same file, and one backward pass for each item.
Unlike the true Fisher information it is small where the model is sure of the gold answer (Kunstner et al. 2019).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.loglikelihood import Plan, Row, kept_logits, plan_batches
from evomerge.evaluate.tasks import Item, Task, deal, items_of
from evomerge.files import sync, written_aside
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.memory import host_memory
from evomerge.merge.live import destinations, live_tensor
from evomerge.merge.measure.statistics_file import Origin
from evomerge.merge.methods.plan import Statistics
from evomerge.sources.anatomy import place
from evomerge.sources.locate import model_fingerprint
from evomerge.sources.models import open_models

Rows = Sequence[Sequence[Row]]
"""Per item, the rows of its gold answer."""


def choose_items(tasks: Sequence[Task], count: int, search: SearchConfig | None) -> dict[str, list[Item]]:
    """The first `count` items of each task.

    search: a configuration, of whose search split the items are; None takes the task's training split, or, if it has
        none, the documents that lm-eval evaluates.
    """
    chosen = {}
    for task in tasks:
        if search is not None:
            pool = deal(task, search.splits, search.seed)["search"]
        else:
            pool = items_of(task, task.lm.training_docs() if task.lm.has_training_docs() else task.docs)
        chosen[task.name] = pool[:count]
    return chosen


def gather_statistics(
    kind: Statistics,
    folder: Path,
    base: Path | None,
    live: tuple[Any, Any],
    tasks: Sequence[Task],
    chosen: Mapping[str, list[Item]],
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Gather the statistics of a model over the chosen items and write them to a file.

    kind: `fisher` or `regmean`.
    folder: the model, or an adapter on `base`.
    live: the model in float32 and its tokenizer, as `open_live_model` gives them.
    chosen: task -> items.
    out: the file.
    progress: called with the number of items done.

    EvomergeError if the statistics are not finite.
    """
    model, tokenizer = live
    bank = Bank(open_models(base or folder, {}))
    engine = Engine(model, tokenizer, batch_tokens=1)
    rows = [engine.requests.gold_rows(task, item) for task in tasks for item in chosen[task.name]]
    items = {name: [item.id for item in found] for name, found in chosen.items()}
    prints = model_fingerprint(folder), model_fingerprint(base) if base else {}
    if kind == "fisher":
        tensors = fisher(model, bank, rows, progress)
        squares = sum(float(x.double().square().sum()) for x in tensors.values())
        size = (squares / max(1, sum(x.numel() for x in tensors.values()))) ** 0.5
        origin = Origin(kind, items, *prints, size=size)
    else:
        tensors, transposed = grams(model, bank, rows, progress)
        origin = Origin(kind, items, *prints, transposed=transposed)
    if broken := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise EvomergeError(f"{folder}: its {kind} statistics of {broken[0]} are not finite on these items")
    write_statistics(out, tensors, origin)


def log_likelihood(model: Any, rows: Sequence[Row]) -> Tensor:
    """The sum of the log-likelihoods of the rows' scored tokens, for autograd; one forward for each row."""
    total = torch.zeros((), device=model.device)
    plan = Plan(budget=1, device=model.device, vocabulary=1, packs=False)
    for row in rows:
        (batch,) = plan_batches([row], plan)
        logits = kept_logits(model, batch).float()  # (K, V)
        total = total + (logits[batch.node, batch.target] - logits.logsumexp(1)[batch.node]).sum()
    return total


def fisher(model: Any, bank: Bank, rows: Rows, progress: Callable[[int], None]) -> dict[str, Tensor]:
    """The mean over items of the squared gradient of the gold answer's log-likelihood, by checkpoint name, float32.

    A gradient is squared and freed as soon as it is complete, so that memory holds the model and the squares, but not
    all gradients.
    """
    names = destinations(model, bank)
    model.requires_grad_(True)
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    with squared_gradients(model, squares):
        for done, item in enumerate(rows, 1):
            torch.autograd.backward(log_likelihood(model, item))
            progress(done)
    model.requires_grad_(False)
    prefix = getattr(model, "base_model_prefix", "") + "."
    found = {}
    for name in names:
        tensor = live_tensor(name, squares, prefix)
        assert tensor is not None, "the parameters have the squares' names"
        found[name] = tensor / max(1, len(rows))
    return found


@contextmanager
def squared_gradients(model: Any, squares: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, every gradient of the model is squared, added to `squares` and freed."""

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares[name].addcmul_(parameter.grad.float(), parameter.grad.float())
            parameter.grad = None

        return hook

    model.zero_grad(set_to_none=True)
    handles = [p.register_post_accumulate_grad_hook(add(name)) for name, p in model.named_parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def grams(
    model: Any, bank: Bank, rows: Rows, progress: Callable[[int], None], room: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The Gram matrix X^T X (in, in) float64 of each linear layer's inputs, by checkpoint name, on the CPU, and the
    names of the layers whose weight is stored (in, out).  A head tied to the embedding is an embedding and has none.

    room: bytes for matrices on the model's device; where they do not all fit, the items are read several times.
    """
    by_place = {(x.data_ptr(), tuple(x.shape)): name for name, x in destinations(model, bank).items()}
    found: dict[str, Tensor] = {}
    transposed: list[str] = []
    layers: list[tuple[Any, str]] = []
    for module in model.modules():
        is_conv1d = type(module).__name__ == "Conv1D"
        if not isinstance(module, torch.nn.Linear) and not is_conv1d:
            continue
        name = by_place.get((module.weight.data_ptr(), tuple(module.weight.shape)))
        if name is not None and place(name).component != "embedding":
            layers.append((module, name))
            transposed += [name] if is_conv1d else []
    groups = fitting_groups(layers, gram_room(model.device) if room is None else room)
    for number, group in enumerate(groups):
        here: dict[str, Tensor] = {}
        with watched(group, here):
            for done, item in enumerate(rows, 1):
                log_likelihood(model, item)
                progress((number * len(rows) + done) // len(groups))
        found |= {name: x.cpu() for name, x in here.items()}
    return found, transposed


def gram_room(device: torch.device) -> int:
    """The bytes that Gram matrices may take: half of the free memory."""
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()) // 2


def fitting_groups(layers: Sequence[tuple[Any, str]], room: int) -> list[list[tuple[Any, str]]]:
    """The layers in their order, in groups whose Gram matrices fit into `room` bytes.

    layers: (module, checkpoint name).  A layer whose matrix is larger than `room` is a group of its own.
    """
    groups: list[list[tuple[Any, str]]] = [[]]
    taken = 0
    for module, name in layers:
        size = 8 * module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1] ** 2
        if groups[-1] and taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append((module, name))
        taken += size
    return groups


@contextmanager
def watched(layers: Sequence[tuple[Any, str]], found: dict[str, Tensor]) -> Iterator[None]:
    """Within the context, the inputs of the layers are added to their Gram matrices in `found`."""

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()  # (positions, in)
            gram = found.setdefault(name, x.new_zeros(x.shape[1], x.shape[1]))
            gram.addmm_(x.T, x)

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for module, name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_statistics(out: Path, tensors: Mapping[str, Tensor], origin: Origin) -> None:
    """Write a statistics file in one step."""
    with written_aside(out) as aside:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, aside, metadata=origin.metadata())
        sync(aside)
