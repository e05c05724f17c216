"""The playground: the same bits and scores as the commands, and its page in a real browser."""

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from searches import ROOT, Done, Started, finished_search, run_cli, start_cli, write_config

from evomerge.errors import EvomergeError
from evomerge.merge.live import destinations
from evomerge.merge.recipe.recipe import dump_recipe, load_recipe
from evomerge.play.answer import answer, prompt_of, without_cache
from evomerge.play.live_model import recipe_name
from evomerge.play.playground import Playground, open_playground, save_recipe
from evomerge.play.sliders import GROUPS, Slider
from evomerge.sources.tensor_names import tensor_role

NO_NETWORK = """
import socket, sys
real = socket.getaddrinfo
def look_up(host, *rest, **options):
    if host not in (None, "127.0.0.1", "localhost"):
        print("NETWORK", host, file=sys.stderr)
    return real(host, *rest, **options)
socket.getaddrinfo = look_up
"""
REV, ADD = Slider("weight", "rev"), Slider("weight", "add")


@pytest.fixture(scope="module")
def run(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("play")
    return finished_search(write_config(folder, tiny_family, budget={"trials": 8}))


@pytest.fixture(scope="module")
def play(run: Path) -> Playground:
    return open_playground(run, log=lambda line: None)


def live_tensors(play: Playground) -> dict[str, torch.Tensor]:
    """A copy of the live model's tensors by their names in a checkpoint."""
    found = destinations(play.live.evaluator.model, play.live.evaluator.bank)
    return {name: tensor.clone() for name, tensor in found.items()}


# --- Recipes ---


def test_presets_are_base_parents_blends_and_what_the_run_found(play: Playground, run: Path) -> None:
    presets = play.presets
    assert {"base", "rev", "add", "uniform"} < presets.recipes.keys()
    assert presets.found in ("winner of the run", "candidate of the run")
    assert dump_recipe(presets.recipes[presets.found]) == dump_recipe(load_recipe(run / "winner.yaml"))
    assert presets.parent in ("rev", "add")
    assert presets.about


def test_before_the_verdict_the_best_trial_is_what_the_run_found(run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "verdict.json").unlink()
    presets = open_playground(unfinished, log=lambda line: None).presets
    assert presets.found == "best so far"
    assert "no verdict yet" in presets.about


def test_a_configuration_without_a_run_begins_with_the_uniform_blend(run: Path) -> None:
    presets = open_playground(run.parent / "search.yaml", log=lambda line: None).presets
    assert presets.found == "uniform"
    assert presets.about == ""


def test_sliders_that_are_not_moved_change_nothing(play: Playground) -> None:
    for recipe in play.presets.recipes.values():
        assert play.controls.moved(recipe, {}) is recipe


@pytest.mark.parametrize("to", [0.0, 0.35, 1.4])
def test_a_move_scales_the_coefficients_of_all_layers(play: Playground, to: float) -> None:
    found = play.presets.recipes[play.presets.found]
    before = found.model_copy(update={"sources": [s.model_copy(deep=True) for s in found.sources]})
    before.sources[0].parameters["weight"] = [0.2, 0.4, 0.6, 0.8]
    after = play.controls.moved(before, {REV: to})
    assert play.controls.shown(after, REV) == pytest.approx(to, abs=0.005)
    weights = np.array(after.sources[0].parameters["weight"])
    assert weights == pytest.approx(np.array([0.2, 0.4, 0.6, 0.8]) * weights[0] / 0.2)
    assert after.sources[1] == before.sources[1]


def test_coefficients_around_zero_are_replaced(play: Playground) -> None:
    before = play.presets.recipes["rev"].model_copy(deep=True)
    before.sources[0].parameters["weight"] = {"attention": [1.0, -1.0, 1.0, -1.0], "default": 0.0}
    after = play.controls.moved(before, {REV: 0.5})
    assert after.sources[0].parameters["weight"] == {"attention": [0.5] * 4, "default": 0.5}


def test_a_move_of_one_group_changes_its_tensors_alone(play: Playground) -> None:
    start = play.presets.recipes["uniform"]
    play.live.merge(start)
    before = live_tensors(play)
    for group in GROUPS:
        play.live.merge(play.controls.moved(start, {Slider("weight", "rev", group): 1.2}))
        after = live_tensors(play)
        changed = {tensor_role(n).component for n, tensor in after.items() if not torch.equal(tensor, before[n])}
        assert changed
        assert changed <= set(GROUPS[group])


def test_a_source_that_took_no_part_joins_when_it_gets_a_weight(play: Playground) -> None:
    dare = play.controls.with_method(play.presets.recipes["rev"], "dare_ties")
    alone = dare.model_copy(update={"sources": dare.sources[:1]})
    assert [s.name for s in play.controls.moved(alone, {Slider("density", "add"): 0.5}).sources] == ["rev"]
    both = play.controls.moved(alone, {Slider("density", "add"): 0.5, ADD: 0.4})
    assert [s.name for s in both.sources] == ["rev", "add"]
    assert both.sources[1].parameters == {"weight": 0.4, "density": 0.5}


def test_densities_stay_within_their_bounds(play: Playground) -> None:
    start = play.controls.with_method(play.presets.recipes["uniform"], "ties")
    start.sources[0].parameters["density"] = [0.2, 0.4, 0.6, 1.0]
    after = play.controls.moved(start, {Slider("density", "rev"): 0.9})
    assert max(after.sources[0].parameters["density"]) == 1.0  # type: ignore[arg-type, operator, type-var]


def test_every_method_with_sliders_takes_the_recipe_of_another_one(play: Playground) -> None:
    start = play.presets.recipes[play.presets.found]
    assert {"linear", "ties", "dare_ties", "slerp", "task_arithmetic"} <= set(play.controls.methods)
    assert not {"fisher", "regmean", "karcher"} & set(play.controls.methods)
    for method in play.controls.methods:
        recipe = play.controls.with_method(start, method)
        assert play.controls.sliders(recipe, split=False)
        assert ("rev 1" in play.controls.summary(recipe)) == (
            "weight" in {s.knob for s in play.controls.sliders(recipe, split=False)}
        )


# --- The live model ---


def test_the_live_model_has_the_bits_of_the_saved_recipe_merged(play: Playground, tmp_path: Path) -> None:
    start = play.controls.with_method(play.presets.recipes[play.presets.found], "ties")
    recipe = play.controls.moved(
        start, {Slider("weight", "rev", "mlp"): 0.7, Slider("density", "add", "attention"): 0.3}
    )
    merged = play.live.merge(recipe)
    assert merged.seconds > 0
    assert play.live.merge(recipe).seconds == 0, "it is there already"
    live = live_tensors(play)
    save_recipe(recipe, tmp_path / "mine.yaml")
    done = run_cli("merge", tmp_path / "mine.yaml", "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert live.keys() <= written.keys()
    for name, tensor in live.items():
        assert torch.equal(tensor.to(written[name].dtype), written[name]), name


def test_quick_scores_are_those_of_evaluate_on_the_first_search_items(play: Playground, tmp_path: Path) -> None:
    from evomerge.api.evaluate import evaluate
    from evomerge.evaluate.tasks import items_of

    recipe = play.controls.moved(play.presets.recipes["uniform"], {REV: 0.8})
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert run_cli("merge", tmp_path / "mine.yaml", "--out", tmp_path / "merged").returncode == 0
    config = play.live.evaluator.config
    found = evaluate(
        tmp_path / "merged", [t.task for t in config.tasks], dtype="float32", compute_dtype="float32", show=False
    )
    for score in play.score(recipe, 6):
        task = next(t for t in play.task_set.tasks if t.name == score.task)
        place = {item.id: k for k, item in enumerate(items_of(task, task.docs))}
        chosen = [place[item.id] for item in play.task_set.items[score.task]["search"][:6]]
        raw = found.tasks[score.task].raw
        assert score.items == 6
        assert score.by_metric == np.mean([raw[score.metric][k] for k in chosen])
        assert score.by_objective == pytest.approx(np.mean([raw[score.objective][k] for k in chosen]), abs=1e-4)


def test_answers_are_those_of_the_tasks_and_need_no_cache_of_keys_and_values(play: Playground) -> None:
    recipe, example = play.presets.recipes["rev"], play.examples[0]
    reply = play.ask(recipe, example.prompt, stop=example.stop, limit=example.limit)
    work = play.workloads(8)[0]
    with play.live.holding(recipe):
        from evomerge.evaluate.clock import Clock

        play.engine.score(work, Clock())
        assert reply.text == work.items[0].instances[0].resps[0]
        prompt = prompt_of(play.engine, example.prompt, False, "", 20)
        text, cut = answer(play.engine, prompt, play.live.check)
        tokens = without_cache(play.engine, prompt, play.live.check)
    assert cut
    assert len(tokens) == 20
    assert play.engine.text(tokens, prompt.until) == text


def test_a_question_goes_into_the_chat_template_where_its_task_says_so(
    play: Playground, tiny_family: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvomergeError, match="no chat template"):
        play.ask(play.presets.recipes["base"], "rev ab=", chat=True)
    shutil.copytree(tiny_family / "base", tmp_path / "base")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(template, encoding="utf-8")
    task = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "apply_chat_template": True}
    file = write_config(tmp_path, tiny_family, base=str(tmp_path / "base"), tasks=[task])
    chatting = open_playground(file, log=lambda line: None)
    example = chatting.examples[0]
    assert example.chat
    assert "==" not in example.prompt
    recipe = chatting.presets.recipes["rev"]
    reply = chatting.ask(recipe, example.prompt, example.chat, example.stop, example.limit)
    chatting.score(recipe, 8)
    asked = chatting.workloads(8)[0].items[0].instances[0]
    assert asked.args[0] == example.prompt + "="
    assert reply.text == asked.resps[0]


@pytest.mark.parametrize(("text", "limit", "words"), [(" ", 8, "write a prompt"), ("a", 10**6, "leave no room")])
def test_a_prompt_that_cannot_be_asked_is_refused(play: Playground, text: str, limit: int, words: str) -> None:
    with pytest.raises(EvomergeError, match=words):
        play.ask(play.presets.recipes["base"], text, limit=limit)


def test_two_tabs_at_once_get_the_answers_of_their_own_recipes(play: Playground) -> None:
    recipes = [
        play.controls.moved(play.presets.recipes["base"], {REV: w / 10, ADD: 1 - w / 10}) for w in (1, 3, 5, 7, 9)
    ]
    prompts = [example.prompt for example in play.examples[::5]]
    alone = {(k, p): play.ask(r, p, limit=6) for k, r in enumerate(recipes) for p in prompts}
    assert len({reply.text for reply in alone.values()}) > len(prompts), "recipes differ in their answers"
    play.replies.clear()
    wrong: list[object] = []

    def tab(order: list[int]) -> None:
        for k in order:
            for p in prompts:
                reply = play.ask(recipes[k], p, limit=6)
                if (reply.text, reply.recipe) != (alone[k, p].text, recipe_name(recipes[k])):
                    wrong.append((k, p, reply))

    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4]]
    tabs = [threading.Thread(target=tab, args=(order,)) for order in orders]
    for thread in tabs:
        thread.start()
    for thread in tabs:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_recipe_that_breaks_the_model_is_said_to_and_the_next_one_works(play: Playground) -> None:
    start = play.presets.recipes["rev"].model_copy(deep=True)
    start.sources[0].parameters["weight"] = 1e38
    start.parameters["lambda"] = 1e9
    with pytest.raises(EvomergeError, match="no usable model"):
        play.live.merge(start)
    play.live.merge(play.presets.recipes["base"])
    base = load_file(Path(play.live.evaluator.config.base) / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in live_tensors(play).items())


def test_a_recipe_is_saved_under_a_new_name_only(play: Playground, tmp_path: Path) -> None:
    recipe = play.presets.recipes["uniform"]
    (tmp_path / "old.yaml").write_text("mine", encoding="utf-8")
    for name, words in (("old.yaml", "exists already"), ("no/such.yaml", "there is no folder")):
        with pytest.raises(EvomergeError, match=words):
            save_recipe(recipe, tmp_path / name)
    assert (tmp_path / "old.yaml").read_text(encoding="utf-8") == "mine"


# --- The command ---


def test_wrong_input_ends_with_one_sentence(run: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(run, gone)
    content = yaml.safe_load((gone / "config.yaml").read_text(encoding="utf-8"))
    content["sources"][0]["path"] = str(tmp_path / "deleted")
    (gone / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = {
            "not a run folder": run_cli("play", tmp_path, "--no-browser"),
            "no such folder": run_cli("play", gone, "--no-browser"),
            f"port {port} is in use": run_cli("play", run, "--port", port, "--no-browser"),
            'pip install "evomerge[play]"': run_cli("play", run, prelude="import sys; sys.modules['gradio'] = None"),
        }
    for words, done in refused.items():
        assert done.returncode == 2, (words, done)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(words: str, server: Started, seconds: float = 120) -> None:
    """Wait until a server has printed these words."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        server.out.seek(0)
        if words in server.out.read():
            return
        time.sleep(0.1)
    raise AssertionError(f"the server did not print {words!r}")


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[str]:
    """The address of a playground's page; its server must use no network, and Ctrl-C must end it cleanly."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("Gradio is not installed")
    port = free_port()
    server = start_cli("play", run, "--port", str(port), "--no-browser", prelude=NO_NETWORK)
    wait_for("Ctrl-C ends it", server)
    yield f"http://127.0.0.1:{port}"
    os.kill(server.pid, signal.SIGINT)
    done: Done = server.wait()
    assert done.returncode == 130, done
    assert "NETWORK" not in done.stderr
    assert "Traceback" not in done.stderr


class Tab:
    """A tab with the page, and what went wrong in it: console errors, and requests to other hosts."""

    def __init__(self, browser: Any, address: str, width: int = 1280, scheme: str = "light") -> None:
        self.wrong: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else self.wrong.append(r.url)
        )
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def look_at(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.wrong.append(url)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def until(self, holds: Callable[[], bool], what: str = "", seconds: float = 30) -> None:
        """Wait for something to hold.  what: a part of the page, shown if it does not."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.text(what or "#state")
            self.page.wait_for_timeout(50)

    def until_says(self, words: str, where: str) -> None:
        """Wait for words in a part of the page."""
        self.until(lambda: words in self.text(where), where)

    def choose(self, what: str, option: str) -> None:
        self.page.click(f"#{what} input")
        self.page.click(f"ul[role=listbox] li[aria-label='{option}']")

    def move(self, slider: str, start: str, to: float) -> None:
        """Type a number beside a slider, once the page shows where it starts."""
        field = self.page.locator(f"#{slider} input[type=number]")
        field.wait_for()
        self.until(lambda: field.input_value() == start)
        self.page.wait_for_timeout(300)  # the page sets its parts one after the other
        field.fill(str(to))
        field.press("Enter")

    def close(self) -> None:
        assert self.wrong == []
        self.page.context.close()


def test_the_page_is_served_under_the_names_of_this_machine_alone(served: str) -> None:
    for host, status in (("127.0.0.1", 200), ("localhost", 200), ("evil.example", 400)):
        with contextlib.closing(http.client.HTTPConnection(served.removeprefix("http://"))) as connection:
            connection.request("GET", "/", headers={"Host": host})
            assert connection.getresponse().status == status, host


def test_the_page_moves_asks_scores_and_saves(served: str, browser: Any, play: Playground, tmp_path: Path) -> None:
    tab = Tab(browser, served)
    tab.choose("preset", "rev")
    tab.until_says("rev 1, add 0", "#state")
    tab.move("move-weight-add", "0", 0.6)
    tab.until_says("rev 1, add 0.6", "#state")
    assert "merged in" in tab.text("#state")
    this = play.controls.moved(play.presets.recipes["rev"], {ADD: 0.6})
    name, example = recipe_name(this), play.examples[0]
    tab.page.click("#ask")
    tab.until_says(name, "#answer-2")
    for k, recipe in enumerate(
        (play.presets.recipes[play.presets.parent], play.presets.recipes[play.presets.found], this)
    ):
        reply = play.ask(recipe, example.prompt, stop=example.stop, limit=example.limit)
        assert tab.page.input_value(f"#answer-{k} textarea") == reply.text
        assert recipe_name(recipe) in tab.text(f"#answer-{k}")
    tab.page.click("#score")
    tab.until_says(name, "#scores")
    cells = [float(x) for x in tab.page.locator("#scores td:last-child").all_inner_texts()]
    assert cells == [round(x, 3) for s in play.score(this, 12) for x in (s.by_metric, s.by_objective)]
    assert example.gold in tab.text("#gold")
    tab.page.fill("#prompt textarea", "something else")
    tab.until(lambda: tab.text("#gold").strip() == "", "#gold")
    tab.page.fill("#path textarea, #path input", str(tmp_path / "mine.yaml"))
    tab.page.click("#save")
    tab.until_says("written", "#saved")
    assert load_recipe(tmp_path / "mine.yaml") == this
    tab.page.click("#save")
    tab.until_says("exists already", "#saved")
    tab.close()


def test_the_page_changes_method_and_splits_its_sliders(served: str, browser: Any, play: Playground) -> None:
    tab = Tab(browser, served)
    tab.choose("method", "dare_ties")
    tab.until_says("dare_ties", "#state")
    tab.page.wait_for_selector("#move-density-rev", state="visible")
    tab.page.click("#split input")
    tab.page.wait_for_selector("#move-density-rev-mlp", state="visible")
    assert not tab.page.is_visible("#move-density-rev")
    tab.page.click("#follow input")
    tab.move("move-density-rev-mlp", "1", 0.5)
    found = play.controls.with_method(play.presets.recipes[play.presets.found], "dare_ties")
    name = recipe_name(play.controls.moved(found, {Slider("density", "rev", "mlp"): 0.5}))
    tab.until_says(name, "#state")
    tab.until_says(name, "#answer-2")
    tab.page.click("#again")
    tab.until_says(recipe_name(play.presets.recipes[play.presets.found]), "#state")
    assert not tab.page.is_visible("#move-density-rev-mlp")
    tab.close()


def test_two_tabs_do_not_move_each_other(served: str, browser: Any, play: Playground) -> None:
    first, second = Tab(browser, served), Tab(browser, served)
    first.choose("preset", "rev")
    second.choose("preset", "add")
    for tab, preset in ((first, "rev"), (second, "add")):
        tab.until_says(recipe_name(play.presets.recipes[preset]), "#state")
    first.page.click("#ask")
    second.page.click("#ask")
    for tab, preset in ((first, "rev"), (second, "add")):
        tab.until_says(recipe_name(play.presets.recipes[preset]), "#answer-2")
        tab.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(served: str, browser: Any, width: int, scheme: str) -> None:
    tab = Tab(browser, served, width, scheme)
    tab.page.click("#score")
    tab.until_says("this recipe", "#scores")
    tab.page.click("#options button")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    dark = tab.page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(x => x < 90)"
    )
    assert dark == (scheme == "dark")
    tab.close()
