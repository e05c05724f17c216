"""Vocabularies: every row of embedding and head belongs to its token, wherever a model's tokenizer puts it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, write_adapter, write_llama, write_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import EvomergeError
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.output.compare import model_differences
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.embedding_rows import RowsByToken
from evomerge.sources.open_models import open_models
from evomerge.sources.tokenizer import read_vocabulary
from evomerge.sources.tokenizer_union import union_vocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = VOCABULARY[:3]
MOVED = [*SPECIAL, *reversed(VOCABULARY[3:])]
MORE = [*VOCABULARY[:20], "v", *VOCABULARY[20:], "w"]
Folders = Mapping[str, Path]


def recipe_of(folders: Folders, method: str = "linear", **keys: Any) -> Recipe:
    content = {
        "method": method,
        "dtype": "float32",
        "base": {"path": str(folders["base"])},
        "sources": [{"name": n, "path": str(p)} for n, p in folders.items() if n != "base"],
    }
    return Recipe.model_validate(content | keys)


def merged(recipe: Recipe) -> dict[str, Tensor]:
    bank = open_bank(recipe)
    places = destinations(candidate_model(bank, torch.float32), bank)
    materialise(recipe, bank, places)
    return places


def written(recipe: Recipe, folder: Path) -> Path:
    export(recipe, open_bank(recipe), folder, model_card)
    return folder


def row(folder: Path, tensor: str, token: str) -> Tensor:
    """The row of a token in a model on disk."""
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    return open_checkpoint(folder).read(tensor)[vocabulary.tokens[token]]


# --- The rule ---


def obvious_row(rows: Sequence[Tensor | None], which: int) -> Tensor:
    """The row of one token in model `which`; rows: what each model has, the base first, None where it lacks it."""
    own, have = rows[which], [r for r in rows if r is not None]
    if own is not None:
        return own
    if len(have) > 1 and rows[0] is not None:
        return rows[0]
    return sum(have[1:], have[0]) / len(have)


alphabets = st.permutations(VOCABULARY[3:13]).flatmap(
    lambda letters: st.integers(1, 10).map(lambda size: [*SPECIAL, *letters[:size]])
)


@settings(deadline=None, max_examples=40)
@given(
    vocabularies=st.lists(alphabets, min_size=2, max_size=4),
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    tied=st.lists(st.booleans(), min_size=4, max_size=4),
    wanted=st.sampled_from(["base", "union", "1"]),
)
def test_each_row_is_the_tokens_own_or_the_only_one_or_the_bases_or_the_mean(
    vocabularies: list[list[str]],
    padding: list[int],
    tied: list[bool],
    wanted: str,
    tmp_path_factory: pytest.TempPathFactory,
):
    tmp_path = tmp_path_factory.mktemp("models")
    folders = [
        write_llama(tmp_path / str(i), i, vocabulary=v, padding=padding[i], tied=tied[i], layers=1)
        for i, v in enumerate(vocabularies)
    ]
    models = open_models(folders[0], {str(i): f for i, f in enumerate(folders) if i}, vocabulary=wanted)
    assert models.vocabulary is not None
    output = models.vocabulary.tokens
    leader = {"base": 0, "1": 1}.get(wanted)
    if leader is not None:
        assert output == {t: i for i, t in enumerate(vocabularies[leader])}
        size = len(vocabularies[leader]) + padding[leader]
    else:
        in_order = dict.fromkeys(t for v in vocabularies for t in v)
        assert output == {t: i for i, t in enumerate(in_order)}
        size = len(output) + (padding[0] if len(output) == len(vocabularies[0]) else 0)
    for tensor in [EMBEDDING] if all(tied) else [EMBEDDING, HEAD]:
        stored = [open_checkpoint(f).read(tensor) for f in folders]
        for which, model in enumerate([models.base, *models.sources.values()]):
            found = model.read(tensor)
            assert found.shape == (size, 16)
            for token, number in output.items():
                rows = [s[v.index(token)] if token in v else None for s, v in zip(stored, vocabularies, strict=True)]
                assert torch.equal(found[number], obvious_row(rows, which)), (tensor, token, which)
            for number in range(len(output), size):  # padding rows go by their number
                rows = [
                    s[number] if len(v) <= number < len(s) else None for s, v in zip(stored, vocabularies, strict=True)
                ]
                assert torch.equal(found[number], obvious_row(rows, which)), (tensor, number, which)


def test_averaged_rows_keep_the_precision_of_float32(tmp_path: Path):
    kinds = {"dtype": torch.bfloat16, "layers": 1}
    folders = {"base": write_llama(tmp_path / "base", **kinds)} | {
        name: write_llama(tmp_path / name, seed, vocabulary=MORE, **kinds) for seed, name in enumerate("ab", 1)
    }
    models = open_models(folders["base"], {n: folders[n] for n in "ab"}, vocabulary="union")
    mean = sum(row(folders[n], EMBEDDING, "v").float() for n in "ab") / 2
    assert models.vocabulary is not None
    found = models.base.read(EMBEDDING)
    assert found.dtype == torch.float32
    assert torch.equal(found[models.vocabulary.tokens["v"]], mean)
    assert models.sources["a"].read(EMBEDDING).dtype == torch.bfloat16


# --- What comes out ---


@pytest.mark.parametrize("tied", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("wanted", ["base", "union", "one"])
def test_what_is_scored_is_what_is_written_and_loads(wanted: str, tied: tuple[bool, bool], tmp_path: Path):
    folders = {
        "base": write_llama(tmp_path / "base", tied=tied[0], padding=5),
        "one": write_llama(tmp_path / "one", 1, tied=tied[1], vocabulary=MORE[::-1]),
    }
    recipe = recipe_of(folders, "task_arithmetic", parameters={"weight": 0.5}, vocabulary=wanted)
    bank = open_bank(recipe)
    live = candidate_model(bank, torch.float32)
    materialise(recipe, bank, destinations(live, bank))
    out = written(recipe, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(out)
    size = {"base": 45, "union": 42, "one": 42}[wanted]
    assert opened.config.vocab_size == size
    assert opened.config.tie_word_embeddings == all(tied)
    for (name, here), (other, there) in zip(live.named_parameters(), opened.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(here, there), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "a = 12" if wanted == "base" else "vw = 12"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert opened.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    for token in [*tokenizer.get_vocab()]:
        if token in VOCABULARY and token in MORE:
            mixed = row(folders["base"], EMBEDDING, token)
            mixed = mixed + 0.5 * (row(folders["one"], EMBEDDING, token) - mixed)
            assert torch.equal(row(out, EMBEDDING, token), mixed), token
    if wanted != "base":
        assert torch.equal(row(out, EMBEDDING, "v"), row(folders["one"], EMBEDDING, "v"))
    again = written(load_recipe(out / "recipe.yaml"), tmp_path / "again")
    assert model_differences(out, again) == []


@pytest.mark.parametrize("tokens", [VOCABULARY, MOVED], ids=["equal", "moved"])
def test_special_tokens_are_those_of_the_model_whose_vocabulary_it_is(tokens: list[str], tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, vocabulary=tokens)}
    config = json.loads((folders["one"] / "config.json").read_text()) | {"eos_token_id": 7, "rms_norm_eps": 0.5}
    (folders["one"] / "config.json").write_text(json.dumps(config))
    for name, end in (("base", 2), ("one", 7)):
        (folders[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    for wanted, end in (("base", 2), ("union", 2), ("one", 7)):
        recipe = recipe_of(folders, vocabulary=wanted)
        out = written(recipe, tmp_path / f"by {wanted}")
        bank = open_bank(recipe)
        for model in (AutoModelForCausalLM.from_pretrained(out), candidate_model(bank, torch.float32)):
            assert model.generation_config.eos_token_id == end
            assert model.config.eos_token_id == end
            assert model.config.rms_norm_eps != 0.5


def test_added_tokens_of_a_source_stay_what_they_are(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, padding=2)}
    tokenizer = Tokenizer.from_file(str(folders["one"] / "tokenizer.json"))
    tokenizer.add_special_tokens(["<tool>"])
    tokenizer.add_tokens(["ab"])
    tokenizer.save(str(folders["one"] / "tokenizer.json"))
    out = written(recipe_of(folders, vocabulary="union"), tmp_path / "out")
    opened = AutoTokenizer.from_pretrained(out)
    ids = opened("a<tool>ab").input_ids
    assert opened.convert_ids_to_tokens(ids) == ["a", "<tool>", "ab"]
    assert opened.decode(ids, skip_special_tokens=True).replace(" ", "") == "aab"
    assert torch.equal(row(out, EMBEDDING, "<tool>"), row(folders["one"], EMBEDDING, "<tool>"))


# --- The default ---


@pytest.mark.parametrize("wanted", ["base", "one"])
def test_tokens_beyond_the_leaders_rows_get_the_row_of_a_model_that_has_one(wanted: str, tmp_path: Path):
    """`<im>` is in all tokenizers, but only `two` has a row for it; nobody has one for `<never>`."""
    leader, other = ("base", "one") if wanted == "base" else ("one", "base")
    more = [*VOCABULARY, "<im>"]
    folders = {n: write_llama(tmp_path / n, seed) for seed, n in enumerate((leader, other))}
    folders["two"] = write_llama(tmp_path / "two", 2, vocabulary=more)
    write_tokenizer(folders[leader], [*more, "<never>"])
    recipe = recipe_of({n: folders[n] for n in ("base", "one", "two")}, vocabulary=wanted, parameters={"weight": 1})
    found, bank = merged(recipe), open_bank(recipe)
    assert found[EMBEDDING].shape[0] == found[HEAD].shape[0] == bank.layout.config["vocab_size"] == len(more)
    assert torch.allclose(found[EMBEDDING][-1], open_checkpoint(folders["two"]).read(EMBEDDING)[-1])
    assert [
        n
        for n in bank.models.compatibility.notes
        if "names 1 token(s) that no model has a row for, such as '<never>'" in n
    ]


def test_equal_vocabularies_are_left_alone(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base", padding=3), "one": write_llama(tmp_path / "one", 1, padding=3)}
    for wanted in (None, "base", "union", "one"):
        models = open_models(folders["base"], {"one": folders["one"]}, vocabulary=wanted)
        assert not any(isinstance(m, RowsByToken) for m in (models.base, *models.sources.values()))


@pytest.mark.parametrize(("ours", "theirs"), [(0, 8), (8, 0), (8, 3)])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_same_tokenizer_with_other_padding_needs_no_word(method: str, ours: int, theirs: int, tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base", padding=ours),
               "one": write_llama(tmp_path / "one", 1, padding=theirs)}  # fmt: skip
    found = merged(recipe_of(folders, method, parameters={"weight": 1}))
    base, one = (open_checkpoint(folders[n]).read(EMBEDDING) for n in ("base", "one"))
    common = len(VOCABULARY) + min(ours, theirs)
    assert found[EMBEDDING].shape == base.shape
    assert torch.allclose(found[EMBEDDING][:common], one[:common], atol=1e-6)
    assert torch.equal(found[EMBEDDING][common:], base[common:])


def test_another_tokenizer_is_refused_unless_the_recipe_says_how(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, vocabulary=MORE)}
    with pytest.raises(EvomergeError) as caught:
        open_bank(recipe_of(folders))
    lines = str(caught.value).splitlines()
    assert any("one: vocab_size is 42, in the base model 40" in line for line in lines)
    assert any("one: another tokenizer: " in line for line in lines)
    assert (
        lines[-1]
        == "  `vocabulary: base`, `union` or a source's name, in the configuration or recipe, merges them by token"
    )
    open_bank(recipe_of(folders, vocabulary="union"))


def test_a_vocabulary_relaxes_nothing_else(tmp_path: Path):
    folders = {
        "base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, vocabulary=MORE, layers=3)
    }  # fmt: skip
    with pytest.raises(EvomergeError, match="one: num_hidden_layers is 3, in the base model 2"):
        open_bank(recipe_of(folders, vocabulary="union"))


@pytest.mark.parametrize(("name", "wanted"), [("one", "two"), ("union", "union"), ("base", "base")])
def test_a_vocabulary_is_named_without_doubt(name: str, wanted: str):
    with pytest.raises(
        ValueError, match=re.escape(f"vocabulary: '{wanted}' is not one (alone) of base, union, {name}")
    ):
        recipe_of({"base": Path("/base")}, sources=[{"name": name, "path": "/one"}], vocabulary=wanted)


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1)}
    (folders["base"] / "tokenizer.json").unlink()
    with pytest.raises(EvomergeError, match="base: no tokenizer in"):
        open_bank(recipe_of(folders, vocabulary="union"))


def test_a_bank_of_another_vocabulary_is_refused(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1)}
    with pytest.raises(EvomergeError, match="another `vocabulary`"):
        materialise(recipe_of(folders), open_bank(recipe_of(folders, vocabulary="union")), {})


# --- Together with the rest ---


def test_an_adapter_that_leaves_the_embedding_alone_shares_the_bases(tmp_path: Path):
    base = write_llama(tmp_path / "base")
    folders = {"base": base, "lora": write_adapter(tmp_path / "lora", base),
               "one": write_llama(tmp_path / "one", 1, vocabulary=MORE)}  # fmt: skip
    recipe = recipe_of(folders, "ties", vocabulary="union", parameters={"weight": 0.5})
    bank = open_bank(recipe)
    assert bank.source("lora", EMBEDDING) is bank.base(EMBEDDING)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert bank.source("lora", name) is not bank.base(name)
    assert merged(recipe)[EMBEDDING].shape == (42, 16)


def test_nested_recipes_have_vocabularies_of_their_own(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, vocabulary=MORE),
               "two": write_llama(tmp_path / "two", 2, vocabulary=MOVED)}  # fmt: skip
    inner = recipe_of({n: folders[n] for n in ("base", "one")}, vocabulary="union")
    outer = recipe_of({n: folders[n] for n in ("base", "two")}, vocabulary="union").model_dump()
    outer["sources"].append({"name": "inner", "recipe": inner.model_dump()})
    nested = Recipe.model_validate(outer)
    outer["sources"][1] = {"name": "inner", "path": str(written(inner, tmp_path / "inner"))}
    out, stepwise = written(nested, tmp_path / "out"), written(Recipe.model_validate(outer), tmp_path / "stepwise")
    assert model_differences(out, stepwise) == []
    outer["vocabulary"] = "inner"
    by_name = written(Recipe.model_validate(outer), tmp_path / "named")
    assert read_vocabulary(by_name).tokens == read_vocabulary(tmp_path / "inner").tokens  # type: ignore[union-attr]


def test_slices_and_vocabularies_go_together(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base"), "one": write_llama(tmp_path / "one", 1, vocabulary=MORE),
               "two": write_llama(tmp_path / "two", 2, vocabulary=MOVED, layers=3)}  # fmt: skip
    slices = [{"layers": {"one": [0, 2]}}, {"layers": {"two": [1, 3]}}]
    out = written(recipe_of(folders, vocabulary="union", slices=slices), tmp_path / "out")
    assert torch.equal(row(out, EMBEDDING, "v"), row(folders["one"], EMBEDDING, "v"))
    assert torch.equal(row(out, HEAD, "a"), row(folders["two"], HEAD, "a"))
    assert torch.equal(row(out, HEAD, "v"), row(folders["one"], HEAD, "v"))  # the only model that has it
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


# --- Tokenizers of several kinds ---

ENGLISH = ["the cat sat on the mat and the hat", "a cat in the hat sat on that mat"] * 20
GERMAN = ["der Hund bellt über den Gartenzaun", "der Zaun im Garten und der Hund"] * 20


def train(folder: Path, texts: list[str], special: list[str], **config: Any) -> Tokenizer:
    """A byte-level BPE as large models have it, written to a folder.  config: of `tokenizer_config.json`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def united(*folders: Path) -> Any:
    base, *others = (read_vocabulary(f) for f in folders)
    assert base is not None
    out = union_vocabulary(base, [o for o in others if o is not None])
    target = folders[0].with_name("union")
    target.mkdir()
    out.write(target)
    opened = AutoTokenizer.from_pretrained(target)
    assert opened.get_vocab() == out.tokens
    return opened


END = {"content": "<end>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<end>", "bos_token": "<end>"}


@pytest.mark.parametrize("config", [{}, GPT2, {**GPT2, "added_tokens_decoder": {}}],
                         ids=["plain", "gpt2", "gpt2 with added_tokens_decoder"])  # fmt: skip
def test_the_union_of_two_byte_pair_encodings_writes_the_words_of_both(config: dict[str, Any], tmp_path: Path):
    first = train(tmp_path / "en", ENGLISH, ["<end>"], **config)
    if "added_tokens_decoder" in config:
        settings = json.loads((tmp_path / "en" / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"] = {str(first.token_to_id("<end>")): END}
        (tmp_path / "en" / "tokenizer_config.json").write_text(json.dumps(settings))
    second = train(tmp_path / "de", GERMAN, ["<ende>", "<end>"])
    both = united(tmp_path / "en", tmp_path / "de")
    assert {t: both.get_vocab()[t] for t in first.get_vocab()} == first.get_vocab()
    for text in {*ENGLISH, *GERMAN}:
        assert both.decode(both(text).input_ids) == text
    for text in ENGLISH:
        assert both(text).input_ids == first.encode(text).ids
    for text in GERMAN:
        assert len(both(text).input_ids) <= len(first.encode(text).ids)
        assert both.tokenize(text) == second.encode(text).tokens
    assert both.tokenize("der<ende>") == ["der", "<ende>"]
    assert both.all_special_ids == [first.token_to_id("<end>")]
    assert both.decode(both("der<ende>").input_ids, skip_special_tokens=True) == "der"


def test_a_union_with_nothing_new_is_the_base(tmp_path: Path):
    train(tmp_path / "en", ENGLISH, ["<end>"])
    base = read_vocabulary(tmp_path / "en")
    assert base is not None
    assert union_vocabulary(base, [base]) is base


def test_tokens_of_another_kind_of_tokenizer_are_found_as_they_are_written(tmp_path: Path):
    train(tmp_path / "en", ENGLISH, ["<end>"])
    pieces = Tokenizer(WordPiece({"[UNK]": 0, "Zaun": 1, "##x": 2}, unk_token="[UNK]"))
    (tmp_path / "pieces").mkdir()
    pieces.save(str(tmp_path / "pieces" / "tokenizer.json"))
    both = united(tmp_path / "en", tmp_path / "pieces")
    assert "Zaun" in both.tokenize("the Zaun")


def test_a_unigram_base_gets_the_others_tokens_as_added_ones(tmp_path: Path):
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    (tmp_path / "base").mkdir()
    pieces.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    more = Tokenizer(Unigram([("<unk>", 0.0), ("b", -1.0), ("cd", -1.0)], unk_id=0))
    (tmp_path / "more").mkdir()
    more.save(str(tmp_path / "more" / "tokenizer.json"))
    both = united(tmp_path / "base", tmp_path / "more")
    assert both.tokenize("abcd") == ["a", "b", "cd"]
