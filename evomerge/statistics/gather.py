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
from torch import Tensor

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.deal import deal
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.loglikelihood import Plan, Row, kept_logits, plan_batches
from evomerge.evaluate.tasks import Item, Task, items_of
from evomerge.files.write import sync, written_aside
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.memory import host_memory
from evomerge.merge.live import destinations, live_tensor
from evomerge.merge.measure.statistics_file import Origin
from evomerge.merge.methods.method import Statistics
from evomerge.merge.output.shards import TensorSpec, open_writer, size_of
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import tensor_role

Rows = Sequence[Sequence[Row]]
"""Per item, the rows of its gold answer."""


def choose_items(tasks: Sequence[Task], count: int, search: SearchConfig | None) -> dict[str, list[Item]]:
    """The first `count` items of each task.

    search: a configuration, of whose search split the items are; None takes the task's training split, or, if it has
        none, the documents that lm-eval evaluates.

    EvomergeError for a Python task.
    """
    chosen = {}
    for task in tasks:
        if task.is_python:
            raise EvomergeError(f"task {task.name}: statistics need gold answers, which a Python task does not have")
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
        squares = fisher(model, bank, rows, progress)
        total = sum(float(x.double().square().sum()) for x in squares.values())
        size = (total / max(1, sum(x.numel() for x in squares.values()))) ** 0.5
        origin = Origin(kind, items, *prints, size=size)
        names = sorted(squares)
        shapes: dict[str, TensorSpec] = {name: (torch.float32, tuple(squares[name].shape)) for name in names}
        tensors: Iterator[Tensor] = (squares[name] for name in names)
    else:
        layers = linear_layers(model, bank)
        origin = Origin(kind, items, *prints, transposed=[name for name, x in layers.items() if is_transposed(x)])
        shapes, tensors = grams(model, layers, rows, progress)
    write_statistics(out, shapes, tensors, origin, folder)


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

    It needs the model, as many bytes again for the squares (on the model's device, all at once: each item adds to
    each of them), and what one backward pass keeps of an item.  A gradient is squared and freed as soon as it is whole.
    """
    names = destinations(model, bank)
    model.requires_grad_(True)
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    with squared_gradients(model, squares):
        for done, item in enumerate(rows, 1):
            torch.autograd.backward(log_likelihood(model, item))
            progress(done)
    model.requires_grad_(False)
    for square in squares.values():
        square /= max(1, len(rows))
    prefix = getattr(model, "base_model_prefix", "") + "."
    found = {}
    for name in names:
        tensor = live_tensor(name, squares, prefix)
        assert tensor is not None, "the parameters have the squares' names"
        found[name] = tensor
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


def linear_layers(model: Any, bank: Bank) -> dict[str, Any]:
    """The modules of the linear layers by the checkpoint names of their weights.

    A head tied to the embedding is an embedding and not among them.
    """
    by_place = {(x.data_ptr(), tuple(x.shape)): name for name, x in destinations(model, bank).items()}
    layers = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or is_transposed(module):
            name = by_place.get((module.weight.data_ptr(), tuple(module.weight.shape)))
            if name is not None and tensor_role(name).component != "embedding":
                layers[name] = module
    return layers


def is_transposed(module: Any) -> bool:
    """Whether it is a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D"


def gram_shape(module: Any) -> tuple[int, int]:
    """(in, in) of a linear layer."""
    size = module.weight.shape[0 if is_transposed(module) else 1]
    return size, size


def grams(
    model: Any, layers: Mapping[str, Any], rows: Rows, progress: Callable[[int], None], room: int | None = None
) -> tuple[dict[str, TensorSpec], Iterator[Tensor]]:
    """The Gram matrix X^T X (in, in) float64 of the inputs of each linear layer that any item reaches.

    room: bytes for matrices on the model's device; where they do not all fit, the items are read several times, and
    the matrices of one time are let go before the next.  Returns the matrices' names and shapes, in the order of the
    names, and then in this order the matrices, on the model's device.
    """
    ordered = [(layers[name], name) for name in sorted(layers)]
    groups = fitting_groups(ordered, gram_room(model.device) if room is None else room)
    reached: set[str] = set()

    def read(number: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with torch.no_grad(), watched(groups[number], found), noted(ordered if number == 0 else [], reached):
            for done, item in enumerate(rows, 1):
                log_likelihood(model, item)
                progress((number * len(rows) + done) // len(groups))
        return found

    def each(found: dict[str, Tensor]) -> Iterator[Tensor]:
        for number, group in enumerate(groups):
            if number:
                found = read(number)
            for module, name in group:
                if name in reached and name in found:
                    yield found.pop(name)
                elif name in reached:  # an expert to which no token was routed this time
                    yield module.weight.new_zeros(gram_shape(module), dtype=torch.float64)

    matrices = each(read(0))
    return {name: (torch.float64, gram_shape(module)) for module, name in ordered if name in reached}, matrices


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
        size = size_of((torch.float64, gram_shape(module)))
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
            if name not in found:
                found[name] = x.new_zeros(x.shape[1], x.shape[1])
            found[name].addmm_(x.T, x)

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for module, name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noted(layers: Sequence[tuple[Any, str]], reached: set[str]) -> Iterator[None]:
    """While this lasts, the names of the layers that are called come into `reached`."""

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda module, inputs: reached.add(name)

    handles = [module.register_forward_pre_hook(note(name)) for module, name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_statistics(
    out: Path, shapes: Mapping[str, TensorSpec], tensors: Iterator[Tensor], origin: Origin, folder: Path
) -> None:
    """Write the statistics file of the model in `folder` in one step, holding one tensor at a time.

    tensors: those of `shapes`, in its order, on any device.  EvomergeError if one is not finite.
    """
    with written_aside(out) as aside:
        with open_writer(aside, shapes, origin.metadata()) as writer:
            for name in shapes:
                tensor = next(tensors)
                if not tensor.isfinite().all():
                    raise EvomergeError(
                        f"{folder}: its {origin.kind} statistics of {name} are not finite on these items"
                    )
                writer.write(tensor.cpu().contiguous())
                del tensor  # before the next is made
        sync(aside)
