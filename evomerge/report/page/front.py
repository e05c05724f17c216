"""With `goals: pareto` the front of the trials: its members, all trials by their values, the hypervolume."""

from html import escape

from evomerge.report.page.material import Material
from evomerge.report.page.parts import capital, copied, section, table, text
from evomerge.report.page.svg import Frame, chart, corners, legend, line, points, range_of, thinned
from evomerge.search.verdict.front import Front


def front_section(material: Material) -> str:
    """The front; empty without one."""
    front = material.status.front
    if front is None:
        return ""
    unit = "0 is the base, 1 the task's best parent" if front.relative else "unscaled"
    rows = [[escape(m.name), *(f"{value:.3f}" for value in m.values)] for m in front.members]
    content = [text(f"{capital(front.sentence)}. Values on the search items ({unit}).")]
    if len(front.tasks) == 2:
        content.append(trials_chart(front))
    content.append(table(["model", *map(escape, front.tasks)], rows, "numbers"))
    if front.hypervolumes is not None:
        content.append(volume_chart(front.hypervolumes))
    some = ",".join(f"{task}={weight}" for task, weight in zip(front.tasks, (0.7, 0.3), strict=False))
    command = f"evomerge export {material.run.folder} --prefer {some} --out merged/"
    content.append(copied(command, "Write another model of the front; --knee instead of --prefer takes the knee"))
    return section("front", "The front", *content)


def trials_chart(front: Front) -> str:
    """All trials by their values in two tasks."""
    trials = thinned(front.trials)
    xs, ys = front.points.T.tolist()
    along = sorted(m.values for m in front.members)

    def draw(width: int) -> str:
        frame = Frame(width, 320, range_of(xs), range_of(ys), front.tasks[0], front.tasks[1])
        dots = points(
            frame, [t.values[0] for t in trials], [t.values[1] for t in trials], "g", [t.name for t in trials]
        )
        edge = [v[0] for v in along], [v[1] for v in along]
        parts = [dots, line(frame, *edge, "a"), points(frame, *edge, "a", radius=4.5)]
        return frame.draw(*parts, label="All trials by their values in both tasks")

    return legend(("g", "trial"), ("a", "front")) + chart(draw)


def volume_chart(volumes: list[float]) -> str:
    """The hypervolume over the trials."""
    way = corners([float(k) for k in range(1, len(volumes) + 1)], volumes)

    def draw(width: int) -> str:
        frame = Frame(
            width, 220, (0.5, len(volumes) + 0.5), range_of(volumes), "trials scored in full", "hypervolume", whole=True
        )
        return frame.draw(line(frame, *way, "a", steps=True), label="The hypervolume over the trials")

    about = "The volume of values above the base that some trial reaches or exceeds in every task."
    return f"<h3>Hypervolume over trials</h3>{text(about, 'dim')}{chart(draw)}"
