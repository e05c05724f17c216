"""Files of others take bounded time and memory, and a limit of the shell is named as what it is."""

import asyncio
import json
import resource
import shutil
import sys
import time
import tracemalloc
import zlib
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_task
from searches import ROOT, run_cli, write_config
from tokenizers import Tokenizer

from evomerge.config.tasks import SplitsConfig, TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.chat_template import problem_of
from evomerge.evaluate.deal import deal
from evomerge.evaluate.memory_limit import ROOM, MemoryLimit
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.time_limit import TimeLimit, TooLong, try_tokenizer
from evomerge.files.read import TOKENIZER_BYTES, read_json
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.storage.item_scores import pack, unpack
from evomerge.search.workers.local_worker import LocalWorker
from evomerge.search.workers.pool import Pool
from evomerge.sources.tokenizer import open_processor, open_tokenizer, read_vocabulary


@pytest.mark.parametrize("kilobytes", [40, 120])
def test_a_limit_on_the_size_of_files_is_named(kilobytes: int, tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 3})
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10}))"
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert "ulimit -f" in done.stderr or "the disk cannot be read or written" in done.stderr
    assert "damaged" not in done.stderr
    assert run_cli("resume", tmp_path / "run").returncode == 0


@pytest.mark.parametrize("megabytes", [0, 8])
def test_a_limit_on_memory_is_named(megabytes: int, tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    now = "int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (({now}) + ({megabytes} << 20),) * 2)"
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert "error: this process gets no more memory" in done.stderr
    assert "ulimit -v" in done.stderr


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tracemalloc.start()
    try:
        assert read_json(tmp_path / "tokenizer.json", TOKENIZER_BYTES) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_worker_without_memory_says_so(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    small = tmp_path / "python"
    small.write_text(f'#!/bin/sh\nulimit -v 900000\nexec {sys.executable} "$@"\n')
    small.chmod(0o755)
    prelude = f"import sys; sys.executable = {str(small)!r}"
    done = run_cli("search", config, "--run", tmp_path / "run", "--workers", "2", prelude=prelude)
    assert done.returncode == 2, done.stderr
    assert "no worker could be started; the last one ended with exit code 1 (MemoryError" in done.stderr


def test_scores_that_unpack_to_gigabytes_are_refused() -> None:
    bomb = b64encode(zlib.compress(bytes(1 << 30), 9)).decode()
    assert len(bomb) < 2 << 20
    with pytest.raises(EvomergeError, match="no end within"):
        unpack(bomb)
    with pytest.raises(EvomergeError, match="cannot be read"):
        unpack(pack([1.0, 2.0])[:-6])
    assert unpack(pack([1.0, 2.0])).tolist() == [1.0, 2.0]


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


def test_whatever_ends_a_worker_s_start_ends_the_wait_for_it(tmp_path: Path) -> None:
    def fall(*arguments: object) -> Evaluator:
        raise Panic("in a library")

    async def open_pool() -> None:
        pool = Pool([LocalWorker(fall, "cpu", lambda: None)], print)
        try:
            await asyncio.wait_for(pool.open(), 20)
        finally:
            await pool.close()

    with pytest.raises(Panic, match="in a library"):
        asyncio.run(open_pool())


def test_a_tokenizer_whose_pattern_never_ends_is_an_error(tiny_family: Path, tmp_path: Path) -> None:
    family = Path(shutil.copytree(tiny_family, tmp_path / "family"))
    for file in family.glob("*/tokenizer.json"):
        content = json.loads(file.read_text())
        endless = {
            "type": "Split",
            "pattern": {"Regex": "(?:.|.|.|.|.|.)+(?!.|$)"},
            "behavior": "Isolated",
            "invert": False,
        }
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [endless, content["pre_tokenizer"]]}
        file.write_text(json.dumps(content))
    config = write_config(tmp_path, family, budget={"trials": 3})
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2, done.stderr[-500:]
    assert "no requests can be built of its items" in done.stderr
    assert "retry-limit" in done.stderr


def test_a_tokenizer_that_takes_long_is_refused_by_short_texts(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.evaluate.time_limit.TRIAL_SECONDS", 0.1)
    content = json.loads((tiny_family / "base" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pattern"]["Regex"] = "(?:a|a){19}b|."  # some hundredths of a second each
    tokenizer = Tokenizer.from_str(json.dumps(content))
    with pytest.raises(EvomergeError, match=r"s for a text of \d+ characters"):
        try_tokenizer(tokenizer.encode)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BLOWN = "{{ 'x' * 10 ** 10 }}"


@pytest.mark.parametrize(("endless", "reason"), [(LOOP, "take longer than 2 s"), (BLOWN, "need more than 1 GB")])
def test_a_template_without_end_for_an_item_is_an_error(
    endless: str, reason: str, tiny_family: Path, tmp_path: Path
) -> None:
    """The chat of the trial before does not have the word."""
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{% if 'rev' in messages[0].content %}" + endless + "{% endif %}")
    task = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "gold_logprob", "apply_chat_template": True}
    config = write_config(tmp_path, tiny_family, base=str(base), tasks=[task])
    limit = (
        "import evomerge.evaluate.bounds as b, evomerge.evaluate.memory_limit as m\n"
        "b.ITEM_SECONDS, b.ROOM, m.ROOM = 2.0, 1 << 30, 1 << 30"
    )
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=limit)
    assert done.returncode == 2, done.stderr
    assert f"the requests of an item {reason}" in done.stderr


@pytest.mark.parametrize(("endless", "reason"), [(LOOP, "take longer than 0 s"), (BLOWN, "need more than 4 GB")])
@pytest.mark.parametrize("first", [True, False])
def test_a_question_without_end_is_an_error(
    first: bool, endless: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model is opened: lm-eval asks the first, and items with the same question are found by their texts."""
    monkeypatch.setattr("evomerge.evaluate.bounds.ITEM_SECONDS", 0.3)
    docs = [{"n": n, "ten": 10} for n in range(9)]
    template = (
        "{% if n == N %}".replace("N", "0" if first else "7") + endless.replace("10", "ten") + "{% endif %}{{ n }}"
    )
    file = write_task(tmp_path, "t", docs, output_type="generate_until", doc_to_text=template, doc_to_target="y")
    where = f"{file}: the templates" if first else "task t: the texts"
    splits = SplitsConfig(search=3, selection=3, holdout=3)
    with pytest.raises(EvomergeError, match=f"{where} of an item {reason}"):
        deal(open_tasks([TaskConfig(task=str(file))])[0], splits, seed=0)


def test_the_limit_on_memory_is_put_back_after_the_last_of_those_who_set_it() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with MemoryLimit() as outer:
        with MemoryLimit():
            first = resource.getrlimit(resource.RLIMIT_DATA)[0]
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == first > ROOM
        held = bytearray(1 << 30)  # which the next piece of work may have again
        outer.again()
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] >= first + len(held) - (64 << 20)
        with pytest.raises(MemoryError):
            bytearray(ROOM + (64 << 20))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def charsmap(longest: int) -> str:
    """A map of SentencePiece with an empty table and a text of such a length."""
    return b64encode(bytes(4) + b"ab\0" + b"x" * longest + b"\0").decode()


def sequence(*rules: dict[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(rules)}


def template(pieces: Sequence[str], ids: int) -> dict[str, Any]:
    """A template of special tokens around the text.  ids: how many ids the special token has."""
    special = {"id": "<s>", "ids": [0] * ids, "tokens": ["<s>"] * ids}
    named = [{"SpecialToken": {"id": "<s>", "type_id": 0}} if p == "<s>" else TEXT for p in pieces]
    return {"type": "TemplateProcessing", "single": named, "pair": [TEXT, TEXT], "special_tokens": {"<s>": special}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
TEN = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
SPACE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": sequence(*[TEN] * 10)}, "its normalizer may make a text 10,000,000,000 times as long"),
        ({"normalizer": sequence(sequence(TEN, TEN), sequence(TEN, TEN))}, "10,000 times"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 9999}}, "10,000 times"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "has a token or a rule of 1,000,000 characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(5000)}}, "5,000 times"),
        ({"decoder": sequence(*[TEN] * 4, key="decoders")}, "its decoder may make a text 10,000 times"),
        ({"post_processor": template(["A"] * 5000, 1)}, "its post_processor may make a text 5,000 times"),
        ({"post_processor": template([*["<s>"] * 5, "A"], 1000)}, "5,001 times"),
        ({"post_processor": template(["<s>", "A"], 10**5)}, "has a rule with 100,000 entries"),
        ({"model": {"vocab": {"<pad>": 0, "x" * 10**5: 1}}}, "has a token or a rule of 100,000 characters"),
        ({"model": {"continuing_subword_prefix": "x" * 10**5}}, "has a token or a rule of 100,000 characters"),
        ({"added_tokens": [{"id": 0, "content": "x" * 10**5}]}, "has a token or a rule of 100,000 characters"),
        (
            {"normalizer": sequence(SPACE, {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
                                    {"type": "Precompiled", "precompiled_charsmap": charsmap(18)}, {"type": "NFC"}),
             "post_processor": template(["<s>", "A", "<s>"], 1)}, None,
        ),
        ({"normalizer": sequence({"type": "Prepend", "prepend": "_"}, TEN | {"content": "_"})}, None),
    ],
)  # fmt: skip
def test_a_tokenizer_that_may_make_gigabytes_of_a_character_is_refused(
    change: dict[str, Any], reason: str | None, tiny_family: Path, tmp_path: Path
) -> None:
    content = json.loads((tiny_family / "base" / "tokenizer.json").read_text())
    for key, value in change.items():
        content[key] = content[key] | value if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if reason is None:
        read_vocabulary(tmp_path)
        return
    for act in (read_vocabulary, open_tokenizer, open_processor):
        with pytest.raises(EvomergeError, match=f"tokenizer.json: .*{reason}"):
            act(tmp_path)


def test_a_tokenizer_that_is_made_of_other_files_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1}))
    assert len(open_tokenizer(tmp_path)) == 2
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b" * 10**5: 2}))
    with pytest.raises(EvomergeError, match="has a token or a rule of 100,000 characters"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_has_each_rule_once(tiny_family: Path, tmp_path: Path) -> None:
    """Libraries do not agree which of two counts."""
    content = (tiny_family / "base" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.rstrip()[:-1] + f', "normalizer": {json.dumps(TEN)}}}')
    with pytest.raises(EvomergeError, match="the key 'normalizer' occurs twice"):
        read_vocabulary(tmp_path)


def test_work_in_python_ends_at_its_limit_and_not_after_it() -> None:
    def forever() -> None:
        with TimeLimit(0.1):
            while True:
                pass

    with pytest.raises(TooLong):
        forever()
    with TimeLimit(0.5) as limit:
        for _ in range(4):
            limit.again()
            until = time.thread_time() + 0.2
            while time.thread_time() < until:
                pass
    for _ in range(10**6):
        pass


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 2 GB of memory"),
        ("{{ 'x' * 10 ** 7 }}", "makes a text of 10,000,000 characters"),
        ("{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}", None),
        ("{{ raise_exception('not like this') }}", None),
    ],
)
def test_a_chat_template_is_tried_within_bounds(
    template: str, problem: str | None, tiny_family: Path, tmp_path: Path
) -> None:
    assert problem_of(template, seconds=2) == problem
    if problem is None or "longer" in problem:
        return
    base = Path(shutil.copytree(tiny_family / "base", tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template)
    task = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "gold_logprob", "apply_chat_template": True}
    config = write_config(tmp_path, tiny_family, base=str(base), tasks=[task])
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"its chat template {problem}" in done.stderr
