"""Small SVG pictures for the pages: text, lines, bars, axes; readable on a light and on a dark page."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
svg{font:12px system-ui,sans-serif}.bg{fill:#fff}text{fill:#222}.dim{fill:#666}.frame{stroke:#bbb;fill:none}
.grey{stroke:#888;fill:#888}.blue{stroke:#0072b2;fill:#0072b2}.orange{stroke:#d55e00;fill:#d55e00}
.green{stroke:#009e73;fill:#009e73}.purple{stroke:#9a5fb0;fill:#9a5fb0}.line{fill:none;stroke-width:2}
.bar{stroke:none}.outline{fill:none;stroke-width:1}.dash{stroke-dasharray:4 3}.key{stroke:none}
@media(prefers-color-scheme:dark){.bg{fill:#181a1f}text{fill:#e4e4e4}.dim{fill:#aaa}.frame{stroke:#555}
.grey{stroke:#999;fill:#999}.blue{stroke:#5ab4f0;fill:#5ab4f0}.orange{stroke:#ff9a4d;fill:#ff9a4d}
.green{stroke:#3fd0a4;fill:#3fd0a4}.purple{stroke:#cf9be0;fill:#cf9be0}.line,.outline{fill:none}.bar,.key{stroke:none}}
"""
STYLE = STYLE.replace("\n", "")
COLOURS = ("blue", "orange", "green", "purple", "grey")


class Picture:
    """A drawing of a size in pixels, which the page may scale.  y grows downwards, as in SVG."""

    def __init__(self, width: int, height: int, title: str) -> None:
        """title: what the picture shows, for readers who cannot see it."""
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """anchor: start, middle or end.  kind: `dim` for what matters less."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{short(x)}" y="{short(y)}"{of(kind)}{where}>{escape(text)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        size = f'width="{short(width)}" height="{short(height)}"'
        self.parts.append(f'<rect x="{short(x)}" y="{short(y)}" {size}{of(kind)}/>')

    def columns(self, xs: Sequence[float], floor: float, width: float, sizes: Sequence[float], kind: str) -> None:
        """Bars that stand on a line, or hang from it where the size is negative.  xs: their left ends."""
        bars = zip(xs, sizes, strict=True)
        path = "".join(f"M{short(x)} {short(floor)}v{short(-s)}h{short(width)}v{short(s)}z" for x, s in bars if s)
        self.parts.append(f'<path d="{path}"{of(kind)}/>')

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        path = "L".join(f"{short(x)} {short(y)}" for x, y in points)
        self.parts.append(f'<path d="M{path}"{of(kind)}/>')

    def circle(self, x: float, y: float, radius: float, kind: str) -> None:
        self.parts.append(f'<circle cx="{short(x)}" cy="{short(y)}" r="{short(radius)}"{of(kind)}/>')

    def ellipse(self, x: float, y: float, radii: tuple[float, float], degrees: float, kind: str) -> None:
        turn = f' transform="rotate({short(degrees)} {short(x)} {short(y)})"'
        size = f'rx="{short(radii[0])}" ry="{short(radii[1])}"'
        self.parts.append(f'<ellipse cx="{short(x)}" cy="{short(y)}" {size}{turn}{of(kind)}/>')

    def key(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """What the colours mean, side by side.  entries: (kind, text)."""
        for kind, text in entries:
            self.rect(x, y - 9, 10, 10, f"{kind} key" if "outline" not in kind else kind)
            self.text(x + 15, y, text)
            x += 15 + 6.4 * len(text) + 18

    def save(self, file: Path) -> None:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(self.title)}</title>'
        back = f'<rect class="bg" width="{self.width}" height="{self.height}"/>'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{head}<style>{STYLE}</style>{back}{''.join(self.parts)}</svg>\n", encoding="utf-8")


class Axes:
    """A frame with ticks inside a picture, and the places of values in it."""

    def __init__(
        self,
        picture: Picture,
        box: tuple[float, float, float, float],
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        """box: left, top, width, height in pixels.  x, y: the values at the ends."""
        self.picture, self.box, self.x, self.y = picture, box, x, y
        picture.rect(*box, "frame")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The pixels of a value."""
        left, top, width, height = self.box
        return (
            left + width * (x - self.x[0]) / (self.x[1] - self.x[0]),
            top + height * (self.y[1] - y) / (self.y[1] - self.y[0]),
        )

    def labels(self, x: str, y: str) -> None:
        """x: below the frame.  y: above it, at the left."""
        left, top, width, height = self.box
        self.picture.text(left + width / 2, top + height + 32, x, anchor="middle")
        self.picture.text(left, top - 7, y)

    def x_ticks(self, ticks: Iterable[tuple[float, str]]) -> None:
        for value, text in ticks:
            at, bottom = self.place(value, self.y[0])
            self.picture.line([(at, bottom), (at, bottom + 4)], "frame")
            self.picture.text(at, bottom + 16, text, "dim", "middle")

    def y_ticks(self, ticks: Iterable[tuple[float, str]]) -> None:
        for value, text in ticks:
            left, at = self.place(self.x[0], value)
            self.picture.line([(left - 4, at), (left, at)], "frame")
            self.picture.text(left - 7, at + 4, text, "dim", "end")

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> None:
        self.picture.line((self.place(x, y) for x, y in zip(xs, ys, strict=True)), f"{kind} line")

    def dots(self, xs: Sequence[float], ys: Sequence[float], kind: str, radius: float = 3) -> None:
        for x, y in zip(xs, ys, strict=True):
            self.picture.circle(*self.place(x, y), radius, kind)

    def bar(self, x: tuple[float, float], y: tuple[float, float], kind: str) -> None:
        """A rectangle between two values of x and two of y."""
        (left, bottom), (right, top) = self.place(x[0], min(y)), self.place(x[1], max(y))
        self.picture.rect(left, top, right - left, bottom - top, kind)


def short(number: float) -> str:
    """A number with at most one decimal: a tenth of a pixel."""
    return f"{number:.1f}".removesuffix(".0")


def of(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
