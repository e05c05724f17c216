"""The page of a playground, made with Gradio: what is where, and which event (events.py) belongs to what."""

import html
from typing import Any, NamedTuple

import gradio as gr

from evomerge.play.events import LIMIT, THIS, Events, escaped
from evomerge.play.playground import Playground
from evomerge.play.sliders import Slider

ITEMS = (8, 16, 32, 64)
MOVED = (
    "A slider shows the mean of a coefficient over the model. Moving it scales the preset's coefficients, so "
    "differences between layers stay."
)
SCORED = (
    "Means over the first items of each task's search split, never of selection or holdout, which belong to the "
    "verdict: a direction, no proof."
)
STYLE = """
.gradio-container { max-width: min(1240px, 100%) !important; margin: 0 auto !important; padding: 1rem !important; }
.gradio-container main { padding: 0 !important; }
.html-container { padding: 0 2px !important; }
.about h1 { font-size: 1.35rem; margin: 0; }
.about p { margin: .2rem 0 0; overflow-wrap: anywhere; }
.quiet { color: var(--body-text-color-subdued) !important; font-size: var(--text-sm); }
.state { overflow-wrap: anywhere; font-size: var(--text-sm); }
.wrong { color: var(--error-text-color); }
.line { align-items: end; }
.line button { height: 2.6rem; }
.scores table { border-collapse: collapse; width: 100%; font-size: var(--text-sm); }
.scores .html-container { overflow-x: auto; }
.scores th, .scores td { padding: .35rem 0 .35rem .6rem; text-align: right; font-variant-numeric: tabular-nums; }
.scores table, .scores tr, .scores th, .scores td { border: 0 !important; }
.scores tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.scores th { font-weight: 600; vertical-align: bottom; }
.scores small { display: block; font-weight: 400; font-size: .85em; color: var(--body-text-color-subdued); }
.scores th:first-child, .scores td:first-child { text-align: left; padding-left: 0; overflow-wrap: break-word; }
"""


class Moving(NamedTuple):
    """The parts of the page with which a recipe is moved.  start: the recipe that its sliders start from."""

    start: Any
    preset: Any
    method: Any
    split: Any
    knobs: list[Any]
    state: Any
    again: Any
    path: Any
    keep: Any
    saved: Any


class Asking(NamedTuple):
    """The parts of the page with which three recipes are asked the same.  asked: text, chat template, end, limit."""

    left: Any
    middle: Any
    asked: list[Any]
    gold: Any
    given: Any
    send: Any
    follow: Any
    boxes: list[Any]


class Scoring(NamedTuple):
    """The parts of the page with which these recipes are scored."""

    items: Any
    count: Any
    table: Any


def build_page(play: Playground) -> tuple[Any, dict[str, Any]]:
    """The page, and its theme and style for `launch`."""
    events = Events(play)
    with gr.Blocks(title=f"evomerge playground: {play.name}", analytics_enabled=False) as page:
        about = f"<h1>evomerge playground</h1><p>{html.escape(play.name)}</p>"
        gr.HTML(f'{about}<p class="quiet">{html.escape(play.presets.about)}</p>', elem_classes="about", padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=260):
                moving = build_moving(play, events)
            with gr.Column(scale=7, min_width=260):
                asking = build_asking(play, events)
                scoring = build_scoring(play)
        connect(events, moving, asking, scoring)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)
    quiet = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}
    theme.set(**quiet, **{f"{name}_dark": "*neutral_400" for name in quiet})
    return page, {"theme": theme, "css": STYLE}


def build_moving(play: Playground, events: Events) -> Moving:
    """Preset, method, sliders, and where to save the recipe."""
    presets, first = play.presets.recipes, play.presets.recipes[play.presets.found]
    start = gr.State(first)
    preset = gr.Dropdown(list(presets), value=play.presets.found, label="Preset", elem_id="preset")
    methods = sorted({*play.controls.methods, *(recipe.method for recipe in presets.values())})
    movable = play.controls.movable(first)
    method = gr.Dropdown(methods, value=first.method, label="Method", elem_id="method", interactive=movable)
    split = gr.Checkbox(label="Separate sliders for attention, MLP and the rest", elem_id="split")
    knobs = [
        gr.Slider(
            step=0.01, label=label_of(slider), elem_id=id_of(slider), buttons=[], **events.look(first, False, slider)
        )
        for slider in events.every
    ]
    state = gr.HTML(events.merged(first), elem_classes="state", elem_id="state", padding=False)
    again = gr.Button("Back to the preset", size="sm", elem_id="again")
    gr.HTML(MOVED, elem_classes="quiet", padding=False)
    with gr.Row(elem_classes="line"):
        path = gr.Textbox("playground.yaml", label="New file", elem_id="path", min_width=190, scale=3)
        keep = gr.Button("Save as recipe", elem_id="save", min_width=150, scale=2)
    saved = gr.HTML(elem_classes="state", elem_id="saved", padding=False)
    return Moving(start, preset, method, split, knobs, state, again, path, keep, saved)


def build_asking(play: Playground, events: Events) -> Asking:
    """The prompt with its options, and the answers of three recipes."""
    presets, examples = play.presets, play.examples
    names = list(presets.recipes)
    with gr.Row():
        left = gr.Dropdown(names, value=presets.parent, label="Compare with", elem_id="left", min_width=200)
        middle = gr.Dropdown(names, value=presets.found, label="and with", elem_id="middle", min_width=200)
    prompt, chatting, stop, limit = events.take(0) if examples else ("", False, "", LIMIT)
    text = gr.Textbox(prompt, label="Prompt", lines=3, max_lines=14, elem_id="prompt")
    gold = gr.HTML(events.right(prompt), elem_classes="quiet", elem_id="gold", padding=False)
    with gr.Accordion("Search items and options", open=False, elem_id="options"):
        choices = [(f"{e.task}: {escaped(e.prompt)[-60:]}", k) for k, e in enumerate(examples)]
        first = 0 if examples else None
        given = gr.Dropdown(choices, label="A search item as the prompt", value=first, elem_id="given")
        has_template = play.has_chat_template
        chat = gr.Checkbox(
            chatting, label="Put the prompt into the chat template", elem_id="chat", visible=has_template
        )
        with gr.Row():
            end = gr.Textbox(stop, label="Answers end before (\\n: new line)", elem_id="stop", min_width=140)
            most = gr.Number(limit, label="New tokens at most", minimum=1, precision=0, elem_id="limit", min_width=140)
    with gr.Row(elem_classes="line"):
        send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
        follow = gr.Checkbox(label="Ask again after each move", elem_id="follow", min_width=220)
    box = {"info": "not asked yet", "lines": 4, "max_lines": 20, "interactive": False, "min_width": 200}
    with gr.Row():
        shown = enumerate((presets.parent, presets.found, THIS))
        boxes = [gr.Textbox(label=name, elem_id=f"answer-{k}", **box) for k, name in shown]
    return Asking(left, middle, [text, chat, end, most], gold, given, send, follow, boxes)


def build_scoring(play: Playground) -> Scoring:
    """How many items are scored, and the table of scores."""
    longest = max(len(splits["search"]) for splits in play.task_set.items.values())
    counts = [n for n in ITEMS if n < longest] + [longest] * (longest <= ITEMS[-1])
    usual = counts[min(1, len(counts) - 1)]
    with gr.Row(elem_classes="line"):
        items = gr.Dropdown(counts, value=usual, label="Items of each task", elem_id="items", min_width=130)
        count = gr.Button("Score", elem_id="score", min_width=120)
    table = gr.HTML(elem_classes="scores", elem_id="scores", padding=False)
    gr.HTML(SCORED, elem_classes="quiet", padding=False)
    return Scoring(items, count, table)


def connect(events: Events, moving: Moving, asking: Asking, scoring: Scoring) -> None:
    """What each part of the page does when it is used."""
    start, split, knobs, state = moving.start, moving.split, moving.knobs, moving.state
    here, begins, text = [start, split, *knobs], [start, moving.method, *knobs, state], asking.asked[0]
    usual = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([moving.preset.input, moving.again.click], events.choose, [moving.preset, split], begins, **usual)
    moving.method.input(events.change_method, [moving.method, *here], begins, **usual)
    split.input(events.change_split, [split, start, *knobs], begins, **usual)
    moves, follows = [knob.input for knob in knobs], [asking.follow, *asking.asked, *here]
    gr.on(moves, events.move, follows, [state, asking.boxes[2]], trigger_mode="always_last", **usual)
    beside = [asking.left, asking.middle]
    asks = [*beside, *asking.asked, *here]
    gr.on([asking.send.click, text.submit], events.ask, asks, [*asking.boxes, state], **usual)
    scoring.count.click(events.score, [*beside, scoring.items, *here], [scoring.table, state], **usual)
    asking.given.input(events.take, [asking.given], asking.asked, **usual)
    text.change(events.right, [text], [asking.gold], **usual)
    moving.keep.click(events.save, [moving.path, *here], [moving.saved], **usual)


def label_of(slider: Slider) -> str:
    """What a slider is called on the page."""
    where = "" if slider.group is None else f", {'MLP' if slider.group == 'mlp' else slider.group}"
    return slider.knob if slider.source is None else f"{slider.source}: {slider.knob}{where}"


def id_of(slider: Slider) -> str:
    """The id of a slider in the page."""
    return "-".join(filter(None, ("move", slider.knob, slider.source, slider.group)))
