"""What an accelerator needs, as far as a CPU can show it: bytes are counted, little is sent, bits are the same.

A bank with `mapped=False` copies and counts on the CPU as it does on an accelerator.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from models import write_adapter, write_family
from torch import Tensor

from evomerge.config.schema import SearchConfig
from evomerge.device import resolve_device, use
from evomerge.errors import EvomergeError
from evomerge.evaluate import clock as clock_module
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.token_budget import fitting_tokens, kept_budget
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.memory import Room, Share, device_capacity, group_limits, pinned_capacity
from evomerge.merge.bank.transfer import Transfers, pinned_size
from evomerge.merge.materialise import materialise
from evomerge.merge.measure import gram, ranks, sums
from evomerge.merge.measure.prepare import measure_sources
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.search.run import Run
from evomerge.search.workers import make_workers as module
from evomerge.search.workers.process_worker import one_device
from evomerge.search.workers.worker import WorkerSetup
from evomerge.search.workers.worker_options import WorkerOptions
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.open_models import open_models
from evomerge.statistics.gather import fitting_groups

CPU = torch.device("cpu")
NAMES = ["one", "two", "lora"]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = write_family(tmp_path / "models", dtype=torch.bfloat16)
    return found | {"lora": write_adapter(tmp_path / "lora", found["base"])}


def bank_of(folders: dict[str, Path], capacity: int | None = None, mapped: bool = False, **options: object) -> Bank:
    models = open_models(folders["base"], {n: folders[n] for n in NAMES})
    return Bank(models, "cpu", capacity, mapped=mapped, **options)  # type: ignore[arg-type]


def recipe_of(folders: dict[str, Path], method: str, weights: list[float]) -> Recipe:
    pairs = zip(NAMES, weights, strict=True)
    sources = [RecipeSource(name=n, path=str(folders[n]), parameters={"weight": w}) for n, w in pairs]
    knobs = {} if method in ("linear", "task_arithmetic") else {"density": 0.5}
    return Recipe(method=method, base=Model(path=str(folders["base"])), sources=sources, parameters=knobs)


def merged(bank: Bank, recipe: Recipe) -> dict[str, Tensor]:
    out = {n: torch.empty(i.shape, dtype=torch.bfloat16) for n, i in bank.models.base.tensors.items()}
    materialise(recipe, bank, out)
    return out


# --- the bank ---


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della"])
@pytest.mark.parametrize("capacity", [0, 9_000, 1_000_000])
def test_a_candidate_is_the_same_whatever_the_bank_may_hold(method: str, capacity: int, folders: dict[str, Path]):
    recipe = recipe_of(folders, method, [0.0, 0.4, 0.7])
    wanted = merged(bank_of(folders, mapped=True), recipe)
    bank = bank_of(folders, capacity)
    for _ in range(2):
        found = merged(bank, recipe)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert sum(x.nbytes for x in bank.device_cache.held.values()) == bank.room.taken <= capacity
    assert not bank.device_cache.in_use
    assert bank.transfers is not None
    assert not bank.transfers.coming


def test_capacity_is_exact_when_threads_share_a_bank(folders: dict[str, Path]):
    everything = sum(sum(bank_of(folders).sizes(n)) for n in bank_of(folders).names)
    for capacity in (everything // 3, everything):
        bank = bank_of(folders, capacity)

        def ask(name: str, bank: Bank = bank) -> None:
            bank.base(name)
            for source in NAMES:
                bank.source(source, name)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, bank.names * 8))
        assert sum(x.nbytes for x in bank.device_cache.held.values()) == bank.room.taken <= capacity


def test_a_room_never_gives_more_than_it_has():
    room = Room(1000)
    with ThreadPoolExecutor(8) as pool:
        given = sum(pool.map(lambda _: room.take(7), range(1000)))
    assert given == 1000 // 7
    assert room.taken == 7 * given


def sent_keys(bank: Bank) -> list[tuple[str, ...]]:
    """What a bank sends from now on."""
    sent: list[tuple[str, ...]] = []
    assert bank.transfers is not None
    original = bank.transfers.send

    def send(key: tuple[str, ...], read: Callable[[], Tensor]) -> None:
        sent.append(key)
        original(key, read)

    bank.transfers.send = send  # type: ignore[method-assign, assignment]
    return sent


def test_sources_of_weight_zero_are_not_sent(folders: dict[str, Path]):
    bank = bank_of(folders, 0)
    sent = sent_keys(bank)
    merged(bank, recipe_of(folders, "task_arithmetic", [0.0, 0.5, 0.5]))
    assert {key[0] for key in sent} == {"", "two"}  # what the adapter adds is computed of the base


def test_an_interrupted_merge_leaves_nothing_behind(folders: dict[str, Path]):
    bank = bank_of(folders, 0)
    recipe = recipe_of(folders, "ties", [0.3, 0.5, 0.5])
    out = {n: torch.empty(i.shape) for n, i in bank.models.base.tensors.items()}
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(recipe, bank, out, stop)
    assert bank.transfers is not None
    assert not bank.transfers.coming
    assert not bank.device_cache.in_use


def test_ranks_are_counted_and_sent_like_sources(folders: dict[str, Path], tmp_path: Path):
    recipe = recipe_of(folders, "della", [0.3, 0.5, 0.5])
    wanted = merged(bank_of(folders, mapped=True), recipe)
    inputs = {n: model_fingerprint(folders[n]) for n in ("base", *NAMES)}
    for capacity in (0, 20_000):
        bank = bank_of(folders, capacity, cache=tmp_path)
        measure_sources(bank, "della", NAMES, tmp_path, inputs)
        sent = sent_keys(bank)
        found = merged(bank, recipe)
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        assert any(key[0] == "levels" for key in sent)
        assert sum(x.nbytes for x in bank.device_cache.held.values()) == bank.room.taken <= capacity


def test_an_adapter_is_held_as_its_factors_where_not_all_fits(folders: dict[str, Path]):
    small, large = bank_of(folders, 20_000), bank_of(folders, 10_000_000)
    model = small.models.sources["lora"]
    touched = [n for n in small.names if model.may_differ(n)]
    for bank in (small, large):
        for name in touched:
            assert torch.equal(bank.source("lora", name), model.read(name))
    assert not [key for key in small.device_cache.held if key[0] == "lora"]
    assert len(small.model_tensors.changes) == len(touched)
    assert {key[1] for key in large.device_cache.held if key[0] == "lora"} == set(touched)


def test_what_was_derived_is_looked_up_before_its_operands_are_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    recipe = Recipe(
        method="tsv",
        base=Model(path=str(folders["base"])),
        sources=[RecipeSource(name=n, path=str(folders[n])) for n in ("one", "two")],
    )
    bank = bank_of(folders, 1 << 30)
    first = merged(bank, recipe)
    read: list[str] = []
    original = bank.source
    monkeypatch.setattr(bank, "source", lambda s, n: read.append(n) or original(s, n))
    again = merged(bank, recipe)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert bank.derived_tensors.kept
    assert not {n for _, n, *_ in bank.derived_tensors.kept} & set(read)


def test_what_is_on_its_way_and_in_use_stays_within_the_window():
    transfers = Transfers(CPU, 100, Room(0))
    assert transfers.fits(400)  # one thing at a time may be larger
    transfers.send("a", lambda: torch.zeros(60, dtype=torch.uint8))
    assert not transfers.fits(60)
    assert transfers.receive("a") is not None
    assert not transfers.fits(60)  # it is in use
    transfers.finish()
    assert transfers.fits(60)
    assert transfers.receive("b") is None


# --- how much memory there is ---

GB = 1 << 30


def test_a_device_is_shared_with_the_live_model_evaluation_and_other_workers():
    whole, live = 80 * GB, 14 * GB
    alone = device_capacity(whole, whole, live, 1)
    assert 50 * GB < alone < whole * 0.85 - live
    assert device_capacity(whole, whole, live, 2) < (whole - 2 * live) / 2
    assert device_capacity(30 * GB, whole, live, 1) < 30 * GB - live  # somebody else is there
    assert device_capacity(10 * GB, whole, live, 1) == 0


def test_all_workers_of_a_host_pin_half_of_it_at_most():
    assert 4 * pinned_capacity(64 * GB, 4) <= 32 * GB
    assert pinned_size(90 << 20) == 128 << 20  # torch rounds up
    assert pinned_size(1 << 20) == 1 << 20


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/jobs/mine\n", {"jobs/mine/memory.max": "max", "jobs/memory.max": "8589934592"}, [8 * GB]),
        ("0::/jobs/mine\n", {"memory.max": "1073741824"}, [GB]),  # a container that sees its own group as the root
        ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "2147483648"}, [2 * GB]),
        ("0::/\n", {}, []),
    ],
)
def test_limits_of_control_groups_are_seen(membership: str, files: dict[str, str], limits: list[int], tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(membership)
    assert list(group_limits(tmp_path, tmp_path / "own")) == limits
    assert list(group_limits(tmp_path, tmp_path / "nowhere")) == []


def test_batches_are_as_large_as_the_free_memory_holds(tmp_path: Path):
    assert fitting_tokens(20 * GB, 1 << 20) == 1 << 13
    assert fitting_tokens(GB, 1 << 20) == 64
    assert kept_budget(tmp_path / "none") is None
    (tmp_path / "kept").write_text("8192")
    assert kept_budget(tmp_path / "kept") == 8192
    (tmp_path / "kept").write_text("true")
    assert kept_budget(tmp_path / "kept") is None
    assert SearchConfig.model_fields["batch_tokens"].default == "auto"


def test_gram_matrices_of_layers_are_gathered_in_groups_that_fit():
    layers = [(torch.nn.Linear(n, 2), str(n)) for n in (10, 10, 30, 10)]
    groups = [[name for _, name in group] for group in fitting_groups(layers, 8 * 200)]
    assert groups == [["10", "10"], ["30"], ["10"]]


# --- which device ---


@pytest.mark.parametrize(
    ("device", "visible", "wanted"),
    [
        ("cuda:1", None, ({"CUDA_VISIBLE_DEVICES": "1"}, "cuda")),
        ("cuda:1", "4,7", ({"CUDA_VISIBLE_DEVICES": "7"}, "cuda")),
        ("cuda:0", "GPU-5ebe9f43", ({"CUDA_VISIBLE_DEVICES": "GPU-5ebe9f43"}, "cuda")),
        ("cuda", "4,7", ({}, "cuda")),
        ("cpu", None, ({}, "cpu")),
    ],
)
def test_a_worker_sees_one_device(device: str, visible: str | None, wanted: tuple[dict[str, str], str]):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert one_device(device, environment) == wanted


def test_workers_know_with_how_many_they_share_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = SearchConfig.model_construct(device="cuda")
    setup = WorkerSetup(config, tmp_path, "host", {}, {}, {})
    monkeypatch.setattr(module, "devices_of", lambda wanted: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(module, "setup_of", lambda run, config: setup)
    run = Run(tmp_path)
    workers = module.make_workers(WorkerOptions(3), run, config, None, None, lambda: None, print)  # type: ignore[arg-type]
    assert [w.device for w in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [w.setup.share for w in workers] == [Share(2, 3), Share(1, 3), Share(2, 3)]  # type: ignore[attr-defined]
    assert {w.setup.config.device for w in workers} == {"cuda"}  # type: ignore[attr-defined]


def test_a_device_that_is_not_there_is_one_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(resolve_device("cuda:1")) == "cuda:1"
    with pytest.raises(EvomergeError, match="'cuda:2' was asked for, but torch finds 2 here"):
        resolve_device("cuda:2")


def test_a_thread_works_on_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        use(torch.device(name))
    assert chosen == [torch.device("cuda:1")]


def test_a_part_of_a_trial_ends_when_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(clock_module, "synchronise", waited.append)
    device = torch.device("cuda:0")
    clock = Clock(device=device)
    with clock.time("merge"):
        assert waited == [device]
    assert waited == [device, device]


# --- what is measured on a device has the CPU's bits ---


@pytest.mark.parametrize("n", [1, 5, 16, 17, 64, 100, 128, 777, 64 * 17 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_with_few_launches_have_the_same_bits(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "LANES", 16)
    monkeypatch.setattr(sums, "SEGMENT", 64)
    generator = torch.Generator().manual_seed(n)
    scale = 10.0 ** torch.randint(-20, 10, (3, n), generator=generator)
    x = [row.to(dtype) for row in torch.randn((3, n), generator=generator) * scale]
    terms = torch.stack(x).double().square() / 3

    def part(where: slice) -> Tensor:
        return terms[:, where]

    assert np.array_equal(sums.summed(n, part, 3), sums.summed_abreast(n, part, 3))
    assert np.array_equal(gram.gram_matrix(x), gram.gram_matrix_abreast(x))
    exact = [
        row.bfloat16() for row in torch.randn((3, n), generator=generator)
    ]  # whose differences' products are exact
    assert np.array_equal(gram.gram_matrix(exact[1:], exact[0]), gram.gram_matrix_abreast(exact[1:], exact[0]))


@pytest.mark.parametrize("shape", [(7,), (5, 300), (3, 1)])
def test_ranks_by_scatter_are_those_by_sorting(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    rows = (source.float() - base.float()).abs().reshape(1 if len(shape) == 1 else shape[0], -1)
    found = ranks.levels_by_scatter(rows, torch.int32, 16).reshape(shape)
    assert torch.equal(found, ranks.rank_levels(source, base))


def test_auto_finds_an_apple_gpu_and_the_cpu_merges_for_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without such a GPU: what the choice depends on is set, and no tensor is made on it."""
    with pytest.raises(EvomergeError, match="no Apple GPU"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "mps")
    bank = Bank(open_models(folders["base"], {n: folders[n] for n in NAMES}), "mps")
    assert (bank.live_device.type, bank.device.type) == ("mps", "cpu")


def test_a_live_model_on_another_device_than_the_bank_is_merged_on_the_bank_s(folders: dict[str, Path]) -> None:
    bank = bank_of(folders, mapped=True)
    recipe = recipe_of(folders, "ties", [0.3, 0.4, 0.3])
    places = {n: torch.empty(t.shape, dtype=torch.bfloat16, device="meta") for n, t in bank.layout.tensors.items()}
    materialise(recipe, bank, places)  # a kernel that was given a tensor of the meta device would make no number
    places["model.norm.weight"] = torch.empty(bank.layout.tensors["model.norm.weight"].shape, dtype=torch.bfloat16)
    materialise(recipe, bank, places)
    assert torch.equal(places["model.norm.weight"], merged(bank_of(folders), recipe)["model.norm.weight"])
