"""The landscape around the candidate: scores on the straight lines to each parent and to the base."""

from evomerge.errors import EvomergeError
from evomerge.report.page.material import Material
from evomerge.report.page.parts import copied, section, text
from evomerge.report.page.svg import COLOURS, Frame, chart, dotted_line, legend, range_of
from evomerge.search.verdict.landscape import Landscape, read_landscape


def landscape_section(material: Material) -> str:
    """The lines, or the command that measures them; empty without a verdict."""
    if material.verdict is None:
        return ""
    try:
        found = read_landscape(material.run)
    except EvomergeError as error:
        return section("landscape", "The landscape around it", text(f"It cannot be read: {error}.", "dim"))
    if found is None or found.recipe != material.verdict["chosen"].get("recipe"):
        command = f"evomerge report {material.run.folder} --landscape"
        words = "How the scores change on the way from this model to each parent and to the base was not measured."
        return section("landscape", "The landscape around it", text(words, "dim"), copied(command, "Measure it"))
    return section("landscape", "The landscape around it", text(words_of(found)), drawn(found))


def words_of(found: Landscape) -> str:
    """What the picture shows."""
    return (
        f"Mean metric on {found.items} search items along straight lines in weight space, from the candidate (0) to "
        "each parent and to the base (1). A line that sags below both its ends means that the two models lie in "
        "different basins; a peak beside 0 that the search stopped short of the best point."
    )


def drawn(found: Landscape) -> str:
    """The lines of the landscape."""
    curves = [(name, sorted(curve.items())) for name, curve in found.lines.items()]
    values = [value for _, curve in curves for _, value in curve]

    def draw(width: int) -> str:
        frame = Frame(width, 280, (0.0, 1.0), range_of(values), "share of the other model", "mean metric")
        parts = []
        for k, (name, curve) in enumerate(curves):
            titles = [f"{share:.0%} {name}: {value:.3f}" for share, value in curve]
            xs, ys = zip(*curve, strict=True)
            parts.append(dotted_line(frame, xs, ys, COLOURS[k % len(COLOURS)], titles))
        return frame.draw(*parts, label="Scores between the candidate and its parents")

    return legend(*((COLOURS[k % len(COLOURS)], name) for k, (name, _) in enumerate(curves))) + chart(draw)
