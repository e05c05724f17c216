"""What the differences between models mean for a merge, in words: what to leave out, which method, which space."""

from collections.abc import Iterator
from itertools import combinations

from evomerge.merge.measure.distances import ALL, STRANGE, Differences, strangers
from evomerge.search.check.paths import BASE, Paths, Segment

ALIKE, NEAR, AGAINST = 0.9, 0.2, -0.2  # cosines
LONGER = 3.0  # times as long as another change: one weight for both lets it drown the other
CONCENTRATED = 0.8  # of the squared norm in the top fifth: trimming the rest costs little
UNTOUCHED = 0.1  # of the largest share: a component that hardly changes needs no coefficients of its own
SEARCHED = ("attention", "mixer", "mlp", "embedding", "head")


def advice_on(found: Differences, paths: Paths | None) -> list[str]:
    """Sentences on sources, then the method, then the space."""
    bad = dict(left_out(found, paths))
    sentences = [f"leave out {source}: {why}" for source, why in bad.items()]
    good = [s for s in found.distances if s not in bad]
    sentences += pairs(found, paths, good)
    if not good:
        return [*sentences, "no source is left that could be merged"]
    if len(good) == 1:
        sentences.append(f"with {good[0]} alone a search can only weigh it against the base")
    return [*sentences, *method(found, good), *space(found, good)]


def left_out(found: Differences, paths: Paths | None) -> Iterator[tuple[str, str]]:
    """The sources that should not take part, each with the reason."""
    strange = strangers(found.distances)
    barriers = {s.ends[1]: s for s in (paths.segments if paths else []) if s.ends[0] == BASE}
    for source, shares in found.distances.items():
        farthest = max((x for x in shares.values() if x is not None), default=0.0)
        if source in strange:
            yield (
                source,
                f"it changes some weights by {farthest:.0%} of their size. That is another model rather than a "
                f"fine-tune of this base (fine-tunes change less than 10%, two unrelated models more than "
                f"{STRANGE:.0%}), and merging it will most likely destroy both",
            )
        elif farthest == 0.0:
            yield source, "it is the base itself"
        elif source in barriers and barriers[source].is_high:
            yield source, f"{between(barriers[source])}, so even a part of its change breaks the model"
    kept: list[str] = []
    for source, cosines in found.cosines.items():
        like = next((o for o in kept if (cosines[o] or 0.0) > ALIKE), None)
        if like is not None:
            yield source, f"{like} is nearly the same change (cosine {cosines[like]:.2f}), so one of them is enough"
        elif source not in strange:
            kept.append(source)


def between(segment: Segment) -> str:
    one, other = segment.ends
    return f"between {one} and {other} the loss rises by {segment.barrier:.2f} nats a token"


def pairs(found: Differences, paths: Paths | None, good: list[str]) -> Iterator[str]:
    """What two sources do to each other."""
    for one, other in combinations(good, 2):
        cosine = found.cosines[one][other]
        if cosine is not None and cosine < AGAINST:
            yield f"{one} and {other} pull against each other (cosine {cosine:.2f}): each will lose a part"
    if paths is None:
        return
    inner = [s for s in paths.segments if {*s.ends} <= {BASE, *good}]
    if not inner:
        return
    high = [s for s in inner if s.is_high]
    yield from (f"{between(s)}: expect less of merging these two" for s in high)
    if paths.guess < max(x for s in inner for x in (s.losses[0], s.losses[-1])):
        yield (
            f"the text is strange to these models (a uniform guess has a loss of {paths.guess:.2f}), so the losses say "
            "little: give lines that they were trained for"
        )
    elif not high:
        yield f"no barrier: on the lines between base, {', '.join(good)} the loss is hardly ever above that of the ends"


def method(found: Differences, good: list[str]) -> Iterator[str]:
    """Which method to start with."""
    cosines = [c for a, b in combinations(good, 2) if (c := found.cosines[a][b]) is not None]
    carried = [c for s in good if (c := found.redundancy[s]["20%"]) is not None]
    if not cosines or all(AGAINST <= c <= NEAR for c in cosines):
        told = "the sources hardly touch each other" if cosines else "there is one source"
        yield f"method: {told}, so `task_arithmetic` is a good start"
    else:
        signs = [s for pair, c in found.conflicts.items() if set(pair) <= set(good) and (s := c[ALL]) is not None]
        told = f" and disagree in sign on up to {max(signs):.0%} of what both change most" if signs else ""
        yield (
            f"method: the sources overlap{told}, so try `[task_arithmetic, ties, dare_ties]`, and let the search choose"
        )
    if len(good) > 1 and carried and min(carried) > CONCENTRATED:
        yield f"a fifth of the elements carries {min(carried):.0%} or more of each change: trimming (ties) costs little"


def space(found: Differences, good: list[str]) -> Iterator[str]:
    """Which coefficients to search."""
    shares = {kind: max(found.distances[s][kind] or 0.0 for s in good) for kind in found.distances[good[0]]}
    most = max(shares.values())
    moved = [kind for kind, share in shares.items() if kind in SEARCHED and share > UNTOUCHED * most]
    if moved:
        yield (
            f"space: `granularity: layer` and `components: [{', '.join(moved)}]`, where the changes are; the gradient "
            "costs the same for any number of coefficients"
        )
    sizes = {s: max(x or 0.0 for x in found.distances[s].values()) for s in good}
    longest, shortest = max(good, key=sizes.__getitem__), min(good, key=sizes.__getitem__)
    if sizes[longest] > LONGER * sizes[shortest] > 0:
        yield (
            f"{longest} changes {sizes[longest] / sizes[shortest]:.0f} times as much as {shortest}: one weight for all "
            f"would drown {shortest}, so let weights go to 2 (`weight: [0, 2]`)"
        )
