"""A hub id stands for one commit: what a command begins with is what a resume, an export and `reproduce` take."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hub import TOKEN, Hub, forget, running_hub
from models import write_adapter, write_llama
from safetensors.torch import load_file, save_file

from evomerge.api.statistics import gather_statistics
from evomerge.cli import main
from evomerge.config.config_file import load_config
from evomerge.config.paths import pin
from evomerge.errors import EvomergeError
from evomerge.merge.live import locate_live_model
from evomerge.merge.output.compare import model_differences
from evomerge.merge.recipe.recipe import load_recipe
from evomerge.report.inspection import inspect
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.inputs import check_unchanged, create_run
from evomerge.search.models import open_config_models
from evomerge.search.space.baselines import given_recipe
from evomerge.search.space.space import build_space
from evomerge.sources.locate import before_download, fetch, locate, pinned
from evomerge.sources.open_models import open_models, open_named, stored_tensors


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path / "cache", monkeypatch) as found:
        monkeypatch.chdir(tmp_path)
        yield found


def command(*words: str) -> int:
    """A command as in a new process, whose memory of the hub is empty."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evomerge", *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_a_hub_id_is_resolved_once_in_a_command(hub: Hub, tmp_path: Path):
    first = hub.push("me/model", write_llama(tmp_path / "1"))
    folder = locate("me/model")
    assert folder.name == first
    hub.push("me/model", write_llama(tmp_path / "2", 2))
    asked = len(hub.asked)
    assert locate("me/model") == folder
    assert pinned("me/model", {}) == f"me/model@{first}"
    assert len(hub.asked) == asked
    forget()
    assert locate("me/model") != folder


def test_only_hub_ids_are_pinned(hub: Hub, tmp_path: Path):
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert pinned("me/model", {}) == "me/model"
    assert pinned(str(tmp_path), {}) == str(tmp_path)
    assert pinned("me/other", {"me/other": "me/other@1"}) == "me/other@1"
    with pytest.raises(EvomergeError, match="the hub did not give a model of that name"):
        pinned("me/other", {})


def test_an_exported_model_is_reproduced_from_the_commit_that_it_was_made_of(hub: Hub, tmp_path: Path):
    base = hub.push("me/base", write_llama(tmp_path / "base"))
    one = hub.push("me/one", write_llama(tmp_path / "one", 1))
    recipe = {"method": "linear", "base": {"path": "me/base"}, "sources": [{"name": "one", "path": "me/one@main"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert command("merge", "r.yaml", "--out", "merged") == 0
    written = load_recipe(tmp_path / "merged" / "recipe.yaml")
    assert (written.base.path, written.base.asked) == (f"me/base@{base}", "me/base")
    assert (written.sources[0].path, written.sources[0].asked) == (f"me/one@{one}", "me/one@main")
    for name in ("base", "one"):
        hub.push(f"me/{name}", write_llama(tmp_path / f"new {name}", 5))
    assert command("reproduce", "merged/recipe.yaml", "--out", "again", "--check", "merged") == 0
    assert model_differences(tmp_path / "merged", tmp_path / "again") == []
    assert command("merge", "r.yaml", "--out", "newer") == 0
    assert model_differences(tmp_path / "merged", tmp_path / "newer") != []


def write_search(folder: Path) -> Path:
    content = {
        "name": "x",
        "base": "me/base",
        "sources": [{"name": "a", "path": "me/one"}],
        "method": "task_arithmetic",
        "space": {"weight": [0, 1]},
        "tasks": [{"task": "x"}],
        "baselines": ["other.yaml"],
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    recipe = {
        "method": "linear",
        "base": {"path": "me/base"},
        "sources": [{"name": "theirs", "path": "me/one", "parameters": {"weight": 0.5}}],
    }
    (folder / "other.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "search.yaml"


def test_a_run_keeps_its_commits_when_the_hub_moves_on(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = hub.push("me/base", write_llama(tmp_path / "base"))
    one = hub.push("me/one", write_llama(tmp_path / "one", 1))
    file, task_set = write_search(tmp_path), TaskSet([], {})
    monkeypatch.setattr("evomerge.search.inputs.open_task_set", lambda config: task_set)  # no task is asked here
    run = create_run(pin(load_config(file), {}), task_set, file, tmp_path / "run")
    kept = yaml.safe_load(run.config_file.read_text())
    assert kept["base"] == f"me/base@{base}"
    assert kept["hub"] == {"me/base": f"me/base@{base}", "me/one": f"me/one@{one}"}
    for name in ("base", "one"):
        hub.push(f"me/{name}", write_llama(tmp_path / f"new {name}", 5))
    forget()
    config = check_unchanged(run, accept=False)
    assert config == run.config()
    space = build_space(config, open_config_models(config))
    recipe = space.recipe(space.point({"a": {"weight": 0.5}}, {}) or {})
    assert [recipe.base.path, recipe.sources[0].path] == [f"me/base@{base}", f"me/one@{one}"]
    baseline = given_recipe(space.config, tmp_path / "other.yaml")
    assert [baseline.base.path, baseline.sources[0].path] == [f"me/base@{base}", f"me/one@{one}"]
    assert baseline.sources[0].name == "a"


def test_another_model_in_the_file_is_a_difference(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed, name in enumerate(("base", "one", "two")):
        hub.push(f"me/{name}", write_llama(tmp_path / name, seed))
    file, task_set = write_search(tmp_path), TaskSet([], {})
    monkeypatch.setattr("evomerge.search.inputs.open_task_set", lambda config: task_set)
    run = create_run(pin(load_config(file), {}), task_set, file, tmp_path / "run")
    file.write_text(file.read_text().replace("me/one", "me/two"))
    with pytest.raises(EvomergeError, match=r"sources.0.path: me/one@\w+ -> me/two@\w+"):
        check_unchanged(run, accept=False)
    accepted = check_unchanged(run, accept=True)
    assert accepted.hub.keys() == {"me/base", "me/one", "me/two"}
    assert json.loads(run.manifest_file.read_text())["inputs"].keys() == {"base", "a"}


def test_models_that_do_not_fit_are_refused_before_any_weight_is_downloaded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("evomerge.sources.hub.FIRST_BYTES", 1000)  # less than these headers have
    hub.push("me/base", write_llama(tmp_path / "base"))
    deep = hub.push("me/deep", write_llama(tmp_path / "deep", 1, layers=3))
    recipe = {"method": "linear", "base": {"path": "me/base"}, "sources": [{"name": "deep", "path": "me/deep"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert command("merge", "r.yaml", "--out", "merged") == 2
    said = capsys.readouterr().err
    assert "deep: has " in said
    assert "tensor(s) that the base model lacks" in said
    assert "evomerge-headers" not in said
    weights = (tmp_path / "deep" / "model.safetensors").stat().st_size
    assert 1000 < hub.sent["model.safetensors"] < weights / 2
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    (tmp_path / "deep" / "tokenizer.json").unlink()
    assert not inspect("me/base", "me/deep").mergeable
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    (tmp_path / "deep" / "model.safetensors").rename(tmp_path / "deep" / "pytorch_model.bin")
    pickled = hub.push("me/deep", tmp_path / "deep")
    forget()
    with pytest.raises(EvomergeError, match=f"me/deep@{pickled}: holds a pickle checkpoint"):
        inspect("me/base", "me/deep")
    assert deep != pickled


def test_a_search_opens_its_models_before_it_downloads_them(hub: Hub, tmp_path: Path):
    hub.push("me/base", write_llama(tmp_path / "base"))
    hub.push("me/one", write_llama(tmp_path / "deep", 1, layers=3))
    config, here = pin(load_config(write_search(tmp_path)), {}), tmp_path / "cache"
    with pytest.raises(EvomergeError, match=r"a: has 9 tensor\(s\) that the base model lacks"):
        open_config_models(config)
    assert not list(here.rglob("model.safetensors"))
    hub.push("me/one", write_llama(tmp_path / "one", 1))
    forget()
    told: list[int] = []
    open_config_models(pin(load_config(tmp_path / "search.yaml"), {}), progress=lambda done, total: told.append(total))
    assert told[-1] == sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "one"))
    assert len(list(here.rglob("model.safetensors"))) == 2


def test_a_model_to_score_is_opened_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path):
    one, base = write_llama(tmp_path / "one"), write_llama(tmp_path / "base")
    hub.push("me/base", base)
    hub.push("me/short", write_llama(tmp_path / "short", layers=1))
    hub.push("me/lora", write_adapter(tmp_path / "lora", base))
    (one / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    own = hub.push("me/own", one)
    for model, below, reason in (
        ("me/own", None, f"me/own@{own}: transformers cannot open it"),
        ("me/lora", None, "is an adapter; name its base model with --base"),
        ("me/lora", "me/short", "model.layers.1"),
    ):
        with pytest.raises(EvomergeError, match=reason):
            locate_live_model(model, below)
        with pytest.raises(EvomergeError, match=reason):
            gather_statistics("fisher", model, tmp_path / "new", [], below, 1, None, "cpu")
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    assert not list((tmp_path / "cache").rglob("adapter_model.safetensors"))
    scored, below = locate_live_model("me/lora", "me/base")
    assert below is not None
    assert (scored / "adapter_model.safetensors").is_file()
    assert (below / "model.safetensors").is_file()


def test_headers_alone_tell_what_whole_files_tell(hub: Hub, tmp_path: Path):
    """Also where values count: tensors of integers, an adapter's base, a head that equals the embedding."""
    base, one = write_llama(tmp_path / "base", tied=True), write_llama(tmp_path / "one", 1, tied=True)
    for folder, seed in ((base, 0), (one, 1)):
        weights = load_file(folder / "model.safetensors")
        head = weights["model.embed_tokens.weight"].clone() + seed  # the source's is another matrix
        numbers = torch.arange(5)
        save_file(weights | {"lm_head.weight": head, "model.expert_numbers": numbers}, folder / "model.safetensors")
    lora = write_adapter(tmp_path / "lora", base)
    names = {"base": base, "me/one": one, "me/lora": lora, "me/base": base}
    for name in ("me/one", "me/lora", "me/base"):
        hub.push(name, names[name])
    sources = {"one": one, "lora": lora}
    local = open_models(base, sources, strict=False).compatibility
    assert not local.problems
    for asked in (str(base), "me/base"):
        ids = {name: f"me/{name}" for name in sources}
        with before_download([asked, *ids.values()]) as headers:
            assert len(headers.folders) == (3 if asked == "me/base" else 2)
            here = {name: locate(headers.stand_in(text)) for name, text in ids.items()}
            found = open_models(locate(headers.stand_in(asked)), here, strict=False).compatibility
        assert found.problems == []
    assert open_named("me/base", ids).compatibility.notes == local.notes
    assert stored_tensors("me/one").keys() == load_file(one / "model.safetensors").keys()


def test_only_weights_that_are_read_are_downloaded(hub: Hub, tmp_path: Path):
    folder = write_llama(tmp_path / "base")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights under other names")
    hub.push("me/base", folder)
    told: list[tuple[int, int]] = []
    fetch(["me/base"], lambda done, total: told.append((done, total)))
    here = locate("me/base")
    assert (here / "model.safetensors").is_file()
    assert not (here / "consolidated.safetensors").exists()
    size = (folder / "model.safetensors").stat().st_size
    assert told[-1] == (size, size)


def test_a_full_disk_is_told_before_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.push("me/base", write_llama(tmp_path / "base"))
    monkeypatch.setattr("evomerge.sources.hub.SPARE_BYTES", 1 << 60)
    with pytest.raises(EvomergeError, match=r"GB are to be downloaded \(me/base@\w+\)"):
        fetch(["me/base"])
    assert hub.sent["model.safetensors"] == 0


def test_the_cache_serves_without_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = hub.push("me/base", write_llama(tmp_path / "base"))
    folder = locate("me/base")
    forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert locate("me/base") == locate(f"me/base@{commit}") == folder
    assert pinned("me/base", {}) == f"me/base@{commit}"
    (folder / "model.safetensors").unlink()
    forget()
    with pytest.raises(EvomergeError, match=f"me/base@{commit}: its weights are not in the cache"):
        locate("me/base")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two models of this machine; one of them must not be used commercially."""
    one = write_llama(tmp_path / "one", 1)
    (one / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    models = {"base": {"path": str(write_llama(tmp_path / "base"))}, "sources": [{"name": "one", "path": str(one)}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"method": "linear", **models}))
    return tmp_path / "r.yaml"


def test_an_upload_is_refused_before_any_work(hub: Hub, recipe: Path, capsys: pytest.CaptureFixture[str]):
    for words, told in (
        (["--push", "me"], "'me' is no name of a repository; give OWNER/NAME"),
        (["--push", "me/a//b"], "is no name of a repository"),
        (["--out", "x", "--dry-run"], "--dry-run: say where to upload with --push OWNER/NAME"),
        (["--push", "me/new"], "no token of the Hugging Face hub is stored; log in with `hf auth login`"),
    ):
        assert command("merge", str(recipe), *words) == 2
        assert told in capsys.readouterr().err
    log_in()
    hub.add("me/old", {".gitattributes": b"", "model.safetensors": b""})
    assert command("merge", str(recipe), "--push", "me/old") == 2
    assert "me/old: has files on the hub already (model.safetensors)" in capsys.readouterr().err
    assert not [f for f in recipe.parent.iterdir() if f.name.startswith("push-")]
    assert hub.received == 0


def log_in() -> None:
    file = Path(huggingface_hub.constants.HF_TOKEN_PATH)
    file.parent.mkdir(exist_ok=True)
    file.write_text(TOKEN)


def test_a_merge_is_uploaded_and_an_upload_that_broke_is_repeated(
    hub: Hub, recipe: Path, capsys: pytest.CaptureFixture[str]
):
    log_in()
    hub.broken = True
    assert command("merge", str(recipe), "--push", "me/merged", "--private") == 2
    said = capsys.readouterr().err
    assert "one (cc-by-nc-4.0): so the merge must not be used commercially either" in said
    assert "me/merged: the upload failed; run the command again" in said
    sent = hub.received
    hub.broken = False
    assert command("merge", str(recipe), "--push", "me/merged", "--private") == 0
    shown = capsys.readouterr()
    assert hub.received == sent  # the weights had arrived
    assert hub.private == {"me/merged"}
    assert TOKEN not in shown.out + shown.err
    assert not [f for f in recipe.parent.iterdir() if f.name.startswith("push-")]
    files = hub.newest("me/merged")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "recipe.yaml"} <= files.keys()
    for name in ("README.md", "recipe.yaml"):
        assert str(recipe.parent) not in files[name].decode()
        assert TOKEN not in files[name].decode()
    card = files["README.md"].decode()
    assert "license: cc-by-nc-4.0" in card or "license: other" in card
    assert 'from_pretrained("me/merged")' in card
    assert yaml.safe_load(files["recipe.yaml"])["outputs"]["model.safetensors"] in hub.objects
    (recipe.parent / "cache" / "token").unlink()
    here = locate("me/merged")
    assert (here / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_an_adapter_is_uploaded_without_the_path_of_its_base(hub: Hub, recipe: Path):
    log_in()
    content = yaml.safe_load(recipe.read_text())
    content["sources"] = [{"name": "it", "path": str(write_adapter(recipe.parent / "it", recipe.parent / "base"))}]
    recipe.write_text(yaml.safe_dump(content))
    assert command("merge", str(recipe), "--push", "me/adapter", "--lora", "exact") == 0
    files = hub.newest("me/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert not [name for name, data in files.items() if str(recipe.parent).encode() in data]


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert command("merge", str(recipe), "--push", "me/merged", "--dry-run", "--out", "merged") == 0
    said = capsys.readouterr().out
    size = Path("merged/model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in said
    assert "bytes  README.md" in said
    assert "nothing was sent" in said
    assert hub.asked == []
