"""`evomerge inspect`: its numbers against their definitions, the loss between models, the advice, and its forms."""

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import write_adapter, write_family, write_llama, write_weights
from safetensors.torch import load_file
from searches import run_cli, write_config

import evomerge
from evomerge.errors import EvomergeError
from evomerge.merge.measure.distances import Differences, measure
from evomerge.report.advice import advice_on
from evomerge.report.inspection import WIDTH, Inspection, Table, text_lines
from evomerge.report.inspection_page import page
from evomerge.search.check.paths import Line, Paths, Segment, lines_of_file, measure_paths, token_ids
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import tensor_role
from evomerge.sources.tokenizer import open_tokenizer


def changes_of(family: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    """Source -> tensor -> what the source adds to the base, as float64."""
    base = load_file(family["base"] / "model.safetensors")
    return {
        name: {t: (x - base[t]).double() for t, x in load_file(folder / "model.safetensors").items()}
        for name, folder in family.items()
        if name != "base"
    }


def strongest(change: torch.Tensor, share: float) -> torch.Tensor:
    """Which elements of a tensor belong to its most changed ones."""
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    kept[change.flatten().abs().argsort(descending=True)[: max(1, round(share * change.numel()))]] = True
    return kept


def test_the_numbers_are_what_their_definitions_say(tmp_path: Path) -> None:
    family = write_family(tmp_path, ("one", "two", "three"))
    found = measure(open_models(family["base"], {n: family[n] for n in ("one", "two", "three")}))
    changes, base = changes_of(family), load_file(family["base"] / "model.safetensors")
    mlp = [t for t in base if tensor_role(t).component == "mlp"]
    for name, change in changes.items():
        ours = sum(float(change[t].square().sum()) for t in mlp) ** 0.5
        assert found.distances[name]["mlp"] == pytest.approx(
            ours / sum(float(base[t].double().square().sum()) for t in mlp) ** 0.5
        )
        whole = sum(float(x.square().sum()) for x in change.values())
        fifth = sum(float(x.flatten()[strongest(x, 0.2)].square().sum()) for x in change.values())
        assert found.redundancy[name]["20%"] == pytest.approx(fifth / whole)
    for pair in combinations(changes, 2):
        a, b = (changes[name] for name in pair)
        both = {t: strongest(a[t], 0.2) & strongest(b[t], 0.2) for t in mlp}
        against = sum(int(((a[t] * b[t]).flatten()[m] < 0).sum()) for t, m in both.items())
        assert found.conflicts[pair]["mlp"] == pytest.approx(against / sum(int(m.sum()) for m in both.values()))
    assert not found.sampled


def test_a_sample_says_the_same_as_all_elements(tiny_family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = open_models(tiny_family / "base", {n: tiny_family / n for n in ("rev", "add")})
    whole = measure(models)
    monkeypatch.setattr("evomerge.merge.measure.distances.EXACT", 8000)
    part = measure(models, sample=4000)
    assert part.sampled
    assert part.distances["rev"]["mlp"] == pytest.approx(whole.distances["rev"]["mlp"], rel=0.03)
    assert part.redundancy["add"]["20%"] == pytest.approx(whole.redundancy["add"]["20%"], abs=0.02)
    assert part.conflicts["rev", "add"]["all"] == pytest.approx(whole.conflicts["rev", "add"]["all"], abs=0.05)


def test_the_change_of_an_adapter_is_its_product(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    found = measure(open_models(base, {"adapter": adapter}))
    assert found.distances["adapter"]["attention"]
    assert found.distances["adapter"]["embedding"] == 0
    assert found.by_layer["adapter"][0]


def permuted(source: Path, out: Path) -> Path:
    """The same function with its inner units in another order, so with other weights."""
    weights = load_file(source / "model.safetensors")
    for name in [n for n in weights if n.endswith("gate_proj.weight")]:
        block = name.removesuffix("gate_proj.weight")
        order = torch.randperm(weights[name].shape[0], generator=torch.Generator().manual_seed(1))
        for part in ("gate_proj", "up_proj"):
            weights[f"{block}{part}.weight"] = weights[f"{block}{part}.weight"][order].contiguous()
        weights[f"{block}down_proj.weight"] = weights[f"{block}down_proj.weight"][:, order].contiguous()
    out.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".md"):
            (out / file.name).write_bytes(file.read_bytes())
    write_weights(out, weights)
    return out


def test_a_fine_tune_is_joined_to_its_base_and_the_same_function_elsewhere_is_not(
    tiny_family: Path, tmp_path: Path
) -> None:
    twin = permuted(tiny_family / "rev", tmp_path / "twin")
    text = tmp_path / "lines.txt"
    text.write_text("rev cabfe=efbac\n\nadd 314+205=519\nsort cabfech=abccefh\n")
    found = evomerge.inspect(tiny_family / "base", [tiny_family / "rev", twin], text=text)
    assert found.paths is not None
    by_ends = {s.ends: s for s in found.paths.segments}
    assert by_ends["base", "rev"].barrier < 0.02
    assert by_ends["rev", "twin"].losses[0] == pytest.approx(by_ends["rev", "twin"].losses[-1], abs=1e-4)
    assert by_ends["rev", "twin"].barrier > 0.2
    assert found.strangers == ["twin"]
    assert found.outcome == "these models can be merged, but not with twin"
    assert any(line.startswith("leave out twin: it changes some weights by") for line in found.advice)


def test_losses_at_the_ends_are_those_of_transformers(tiny_family: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = open_models(tiny_family / "base", {"rev": tiny_family / "rev"})
    line = Line("rev cabfe=", "efbac")
    paths = measure_paths(models, [line])
    ids = open_tokenizer(tiny_family / "rev").encode(line.prompt + line.text)
    labels = [-100] * (len(ids) - 5) + ids[-5:]
    for name, loss in zip(("base", "rev"), np.array(paths.segments[0].losses)[[0, -1]], strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_family / name, dtype=torch.float32)
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert float(theirs) == pytest.approx(loss, abs=1e-5)
    assert paths.tokens == 5


def test_lines_are_cut_where_the_prompt_ends(tiny_family: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tiny_family / "base")
    assert token_ids(tokenizer, [Line("", "a")]) == []  # nothing stands before its only token
    ((ids, start),) = token_ids(tokenizer, [Line("add 1+", "2" * 500)])
    assert (start, len(ids) - start) == (len(tokenizer.encode("add 1+")), 128)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(EvomergeError, match="has no line of text"):
        lines_of_file(tmp_path / "empty.txt")


@given(st.lists(st.floats(0, 20), min_size=5, max_size=5))
def test_a_barrier_is_never_below_zero_and_zero_on_a_line(losses: list[float]) -> None:
    assert Segment(("a", "b"), losses).barrier >= 0
    line = [losses[0] + t * (losses[-1] - losses[0]) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert Segment(("a", "b"), line).barrier == pytest.approx(0, abs=1e-9)


def differences(cosine: float, sizes: tuple[float, float] = (0.05, 0.05), carried: float = 0.6) -> Differences:
    names = ("one", "two")
    return Differences(
        {n: {"attention": size, "mlp": size, "norm": 0.0} for n, size in zip(names, sizes, strict=True)},
        {n: [size, size] for n, size in zip(names, sizes, strict=True)},
        {"one": {"one": 1.0, "two": cosine}, "two": {"one": cosine, "two": 1.0}},
        {names: {"attention": 0.4, "mlp": 0.4, "norm": None, "all": 0.4}},
        {n: {"10%": carried / 2, "20%": carried, "50%": 0.9} for n in names},
        False,
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (differences(0.0), "method: the sources hardly touch each other, so `task_arithmetic` is a good start"),
        (differences(0.5), "disagree in sign on up to 40% of what both change most, so try `[task_arithmetic, ties"),
        (differences(-0.4), "one and two pull against each other (cosine -0.40)"),
        (differences(0.97), "leave out two: one is nearly the same change (cosine 0.97), so one of them is enough"),
        (differences(0.0, (0.05, 1.2)), "leave out two: it changes some weights by 120% of their size"),
        (differences(0.0, (0.05, 0.0)), "leave out two: it is the base itself"),
        (differences(0.0, (0.05, 0.01)), "one changes 5 times as much as two"),
        (differences(0.0, carried=0.9), "a fifth of the elements carries 90% or more of each change"),
        (differences(0.0), "`components: [attention, mlp]`"),
    ],
)
def test_what_is_advised(found: Differences, words: str) -> None:
    assert words in "\n".join(advice_on(found, None))


def test_advice_on_the_losses() -> None:
    flat = [1.0] * 5
    hill = [1.0, 1.5, 2.0, 1.5, 1.0]
    ends = (("base", "one"), ("base", "two"), ("one", "two"))

    def advice(*losses: list[float]) -> str:
        paths = Paths([Segment(e, x) for e, x in zip(ends, losses, strict=True)], 1, 9, 3.0)
        return "\n".join(advice_on(differences(0.0), paths))

    assert "no barrier: on the lines between base, one, two" in advice(flat, flat, flat)
    assert "leave out two: between base and two the loss rises by 1.00 nats a token" in advice(flat, hill, flat)
    assert "between one and two the loss rises by 1.00 nats a token: expect less" in advice(flat, flat, hill)
    assert "the text is strange to these models" in advice([4.0] * 5, flat, flat)


@given(
    st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30, unique=True),
    st.integers(1, 30),
    st.integers(0, 5),
)
def test_no_table_is_wider_than_the_terminal(names: list[str], columns: int, hidden: int) -> None:
    table = Table("title", [f"head{k}" for k in range(columns)], {n: ["-12.345"] * columns for n in names}, hidden)
    lines = list(text_lines(table))
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.count("-12.345") for line in lines) >= columns * len(names)  # a name may hold one too


def test_a_configuration_gives_models_and_text_and_the_page_stands_alone(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    done = run_cli("inspect", config, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "Loss from one model to the other, nats a token" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("wrote ")) <= 80
    text = (tmp_path / "page.html").read_text()
    assert not re.findall(r"https?://|<script|src=|@import", text)
    assert text.count("<svg") == 2 + 3  # the layers, for two screens; base - rev, base - add, rev - add
    assert len(text) < 40_000


def test_without_a_text_it_says_how_to_measure_losses(tiny_family: Path) -> None:
    done = run_cli("inspect", tiny_family / "base", tiny_family / "rev")
    assert "Give --text FILE" in " ".join(done.stdout.split())
    assert json.loads(run_cli("inspect", tiny_family / "base", tiny_family / "rev", "--json").stdout)["paths"] is None
    done = run_cli("inspect", tiny_family / "base")
    assert (done.returncode, "give a base and at least one source" in done.stderr) == (2, True)


def test_pairs_of_long_names_stay_apart(tmp_path: Path) -> None:
    names = [f"a-long-name-of-a-model-{k}-of-three" for k in range(3)]
    family = write_family(tmp_path, names)
    found = evomerge.inspect(family["base"], [family[name] for name in names])
    (signs,) = [t for t in found.tables() if t.title.startswith("Opposite signs")]
    assert sorted(signs.rows) == ["1 / 2", "1 / 3", "2 / 3"]


def test_names_are_escaped_on_the_page() -> None:
    hostile = Inspection("<b>llama", 1, 1, 1, ["<script>alert(1)</script>"], ["`<i>`"])
    text = page(hostile)
    assert "<script>" not in text
    assert "<code>&lt;i&gt;</code>" in text


def test_a_broken_point_is_null_in_json(tiny_family: Path) -> None:
    broken = Paths([Segment(("base", "one"), [1.0, float("inf"), 1.0, 1.0, 1.0])], 1, 1, 3.0)
    found = Inspection("llama", 1, 1, 1, [], [], differences(0.0), broken)
    assert json.loads(found.to_json())["paths"]["segments"][0]["barrier"] is None
