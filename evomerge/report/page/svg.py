"""Plain SVG: axes, lines, points and bars.  Colours are classes of style.css, so that they follow light and dark.

Text does not scale with a picture, so a chart is drawn twice, for a wide and for a narrow screen; style.css shows one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

WIDE, NARROW = 960, 330
COLOURS = "abcdefg"  # classes of lines and points in style.css
DIGIT = 6.7  # pixels of one digit of a tick's text, at most

MOST = 1500  # points of one kind in a chart: a page stays small however long the search was

Range = tuple[float, float]
Value = TypeVar("Value")


def chart(draw: Callable[[int], str]) -> str:
    """A chart for both screens.  draw: makes the SVG of a given width."""
    return f"<div class=wide>{draw(WIDE)}</div><div class=narrow>{draw(NARROW)}</div>"


def thinned(values: Sequence[Value], most: int = MOST) -> list[Value]:
    """Every so many of the values, the last one too; about `most` of them."""
    every = math.ceil(len(values) / most)
    return list(values) if every < 2 else [*values[::every], values[-1]]


def corners(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of a line in steps at which y changes, with the first and the last."""
    kept = [k for k, y in enumerate(ys) if k in (0, len(ys) - 1) or y != ys[k - 1]]
    return [xs[k] for k in kept], [ys[k] for k in kept]


def range_of(values: Sequence[float], margin: float = 0.06) -> Range:
    """The range of an axis on which values are shown.  margin: the free share at both ends."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    free = (high - low) * margin or abs(high) * 0.1 or 0.5
    return low - free, high + free


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * s for s in (10, 5, 2, 1, 0.5, 0.2) if s * power >= raw * 0.4]
    found: list[list[float]] = []
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([k * step for k in range(first, last + 1)])
    return min(found, key=lambda values: abs(len(values) - count))


def tick_texts(values: Sequence[float]) -> list[str]:
    """The texts of ticks, all with the digits that their step needs."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return [f"{0.0 if abs(v) < step / 1000 else v:,.{digits}f}" for v in values]


@dataclass(frozen=True)
class Frame:
    """The area of a chart.

    width, height: in pixels, with the margins.
    xs, ys: the ranges of the axes.
    x_title, y_title: of the axes; the title of y stands above the chart.
    whole: whether x is a whole number.
    """

    width: int
    height: int
    xs: Range
    ys: Range
    x_title: str = ""
    y_title: str = ""
    whole: bool = False

    @property
    def left(self) -> float:
        return 10 + DIGIT * max(map(len, tick_texts(self.y_ticks)))

    @property
    def y_ticks(self) -> list[float]:
        return ticks(*self.ys, max(3, self.height // 50))

    @property
    def x_ticks(self) -> list[float]:
        found = ticks(*self.xs, max(3, self.width // 80))
        return [t for t in found if t == int(t)] if self.whole else found

    def x(self, value: float) -> float:
        """Where a value of x stands, in pixels."""
        share = (value - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1.0)
        return self.left + share * (self.width - self.left - 14)

    def y(self, value: float) -> float:
        """Where a value of y stands, in pixels; what lies outside stands at the edge."""
        share = (min(max(value, self.ys[0]), self.ys[1]) - self.ys[0]) / ((self.ys[1] - self.ys[0]) or 1.0)
        return self.height - 38 - share * (self.height - 38 - 22)

    def draw(self, *parts: str, label: str) -> str:
        """The SVG with axes and grid, then `parts`.  label: what the picture shows, for those who cannot see it."""
        right, bottom = self.width - 14, self.height - 38
        found = [
            f"<svg width={self.width} height={self.height} viewBox='0 0 {self.width} {self.height}' role=img "
            f"aria-label='{escape(label, quote=True)}'>"
        ]
        for value, text in zip(self.y_ticks, tick_texts(self.y_ticks), strict=True):
            y = self.y(value)
            found.append(f"<path class=grid d='M{self.left:.1f} {y:.1f}H{right}'/>")
            found.append(f"<text class=tick x={self.left - 6:.1f} y={y + 4:.1f} text-anchor=end>{text}</text>")
        for value, text in zip(self.x_ticks, tick_texts(self.x_ticks), strict=True):
            half = DIGIT * len(text) / 2
            x = min(self.x(value), self.width - half - 1)
            found.append(f"<text class=tick x={x:.1f} y={bottom + 16} text-anchor=middle>{text}</text>")
        found.append(f"<path class=axis d='M{self.left:.1f} {bottom}H{right}'/>")
        found.append(f"<text class=tick x={right} y={bottom + 33} text-anchor=end>{escape(self.x_title)}</text>")
        found.append(f"<text class=tick x=2 y=11>{escape(self.y_title)}</text>")
        return "".join([*found, *parts, "</svg>"])


def points(
    frame: Frame,
    xs: Sequence[float],
    ys: Sequence[float],
    kind: str,
    titles: Sequence[str] = (),
    radius: float = 3.0,
) -> str:
    """Circles.  kind: their class.  titles: shown when the pointer rests on one."""
    found = []
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        title = f"<title>{escape(titles[k])}</title>" if titles else ""
        found.append(f"<circle cx={frame.x(x):.1f} cy={frame.y(y):.1f} r={radius:g}>{title}</circle>")
    return f"<g class={kind}>{''.join(found)}</g>"


def line(frame: Frame, xs: Sequence[float], ys: Sequence[float], kind: str, steps: bool = False) -> str:
    """A line through points.  kind: its class.  steps: whether it stays level up to the next point."""
    if not xs:
        return ""
    path = [f"M{frame.x(xs[0]):.1f} {frame.y(ys[0]):.1f}"]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        path.append(f"H{frame.x(x):.1f}V{frame.y(y):.1f}" if steps else f"L{frame.x(x):.1f} {frame.y(y):.1f}")
    return f"<path class='line {kind}' d='{''.join(path)}'/>"


def dotted_line(frame: Frame, xs: Sequence[float], ys: Sequence[float], kind: str, titles: Sequence[str] = ()) -> str:
    """A line with its points.  kind, titles: as in `points`."""
    return line(frame, xs, ys, kind) + points(frame, xs, ys, kind, titles, 3.5)


def level(frame: Frame, y: float, kind: str) -> str:
    """A dashed line across the chart.  kind: its class."""
    return f"<path class='level {kind}' d='M{frame.left:.1f} {frame.y(y):.1f}H{frame.width - 14}'/>"


def legend(*entries: tuple[str, str]) -> str:
    """The legend of a chart, as HTML above it.  entries: (class, text)."""
    marks = "".join(f"<span><i class={kind}></i>{escape(text)}</span>" for kind, text in entries)
    return f"<p class=legend>{marks}</p>"
