"""Problems of a configuration with its merge methods: their sources, their coefficients and the bounds of these."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from evomerge.config.schema import SearchConfig
from evomerge.config.space import Axis, SpaceConfig
from evomerge.errors import EvomergeError
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knob, choices_of, is_named, values_of
from evomerge.merge.methods.method import Method

Given = Mapping[tuple[str, str], Axis]
"""The coefficients that a file gives: (YAML path of the mapping, name of the coefficient) -> its bounds."""


def method_problems(config: SearchConfig) -> list[str]:
    """The problems with the merge methods: their names, the number of sources, the coefficients and their bounds."""
    names, listed = [s.name for s in config.sources], config.candidate_methods
    problems = [f"sources: the name {n!r} is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"method: {n} is listed twice" for n in sorted({n for n in listed if listed.count(n) > 1})]
    if config.method not in listed:
        problems.append(f"method: {config.method} is not one of `methods`")
    methods: list[Method] = []
    for name in dict.fromkeys(listed):
        try:
            methods.append(METHODS[name])
        except EvomergeError as error:
            problems.insert(0, f"method: {error}")
    if len(methods) < len(set(listed)):
        return problems
    problems += [
        f"space.sources.{source}: there is no source of that name; the sources are {', '.join(names)}"
        for source in config.space.sources
        if source not in names
    ]
    if config.space.layers is not None:
        return problems + layer_problems(config, methods)
    found = [problem for method in methods for problem in problems_of_one(config, method, methods)]
    return problems + list(dict.fromkeys(found))  # methods may have the same problem


def layer_problems(config: SearchConfig, methods: Sequence[Method]) -> list[str]:
    """The problems of a search for layers: other methods and coefficients, and what makes no layer differ."""
    layers = config.space.layers
    assert layers is not None, "only such a search is checked"
    problems = [
        f"space.layers: needs `method: passthrough`, every layer is that of one source; here is {m.name}"
        for m in methods
        if m.name != "passthrough"
    ]
    fields = SpaceConfig.model_fields
    given = [n for n in fields if n != "layers" and getattr(config.space, n) != fields[n].default]
    for name in [*config.space.__pydantic_extra__, *given]:
        hint = "give `scale` in space.layers" if name == "scale" else "leave it out"
        problems.append(f"space.{name}: cannot stand beside space.layers; {hint}")
    if any(s.name == "skip" for s in config.sources):
        problems.append("sources: with space.layers no source can be called skip, which means: no layer")
    if len(config.sources) == 1 and not layers.skip and layers.passes == 1 and layers.scale is None:
        problems.append("space.layers: one source and no `skip`, `passes` or `scale`: there is nothing to search")
    if config.simplify is not None:
        problems.append("simplify: there are no coefficients to leave out in a search for layers")
    if config.sampler.name == "learned":
        problems.append("sampler: learned: a choice of layers has no derivative; give another sampler")
    return problems


def problems_of_one(config: SearchConfig, method: Method, candidates: Sequence[Method]) -> list[str]:
    """The problems of a search by one of its candidate methods.

    A coefficient that only other candidates have is no problem: it is not used with this method.
    """
    in_file = given_coefficients(config.space, method)
    given = {(where, name): axis for (where, name), axis in in_file.items() if name in coefficients(method, where)}
    names = [s.name for s in config.sources]
    problems = [
        *source_problems(config, method),
        *unknown_problems([key for key in in_file if key not in given], candidates),
        *bounds_problems(given, method),
        *missing_problems(given, method, names),
        *excluded_problems(given, method),
    ]
    ordered = config.space.order and method.ordered is not None and len(names) >= method.ordered
    if not problems and not ordered and not any(a.low < a.high for a in given.values()):
        fixed = f"every coefficient of {method.name}" if len(candidates) > 1 else "every coefficient"
        hint = "leave it out" if len(candidates) > 1 else "use `evomerge merge` instead"
        problems.append(f"space: {fixed} is fixed, there is nothing to search; {hint}")
    return problems


def given_coefficients(space: SpaceConfig, method: Method) -> Given:
    """The coefficients in the file, those for all sources and those for single ones."""
    given = {("space", name): axis for name, axis in space.axes(method).items()}
    for source, knobs in space.sources.items():
        given |= {(f"space.sources.{source}", name): axis for name, axis in knobs.items()}
    return given


def coefficients(method: Method, where: str) -> list[str]:
    """The coefficients of a method that may stand in a mapping of the file.  where: its YAML path."""
    return [name for name, knob in method.knobs.items() if where == "space" or knob.each]


def source_problems(config: SearchConfig, method: Method) -> Iterator[str]:
    """Too few or too many sources; sources without the statistics that the method needs."""
    count, (least, most) = len(config.sources), method.sources
    if not least <= count <= (most or count):
        allowed = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
        yield f"sources: {method.name} takes {allowed}, here are {count}"
    for i, source in enumerate(config.sources):
        if method.statistics and source.statistics is None:
            command = f"evomerge statistics --kind {method.statistics}"
            yield f"sources.{i}.statistics: {method.name} needs a file there; make it with `{command}`"


def unknown_problems(unused: Collection[tuple[str, str]], candidates: Sequence[Method]) -> Iterator[str]:
    """Names that are no coefficient of any candidate.  unused: the keys of `Given` that one of them does not use."""
    for where, name in unused:
        allowed = dict.fromkeys(n for m in candidates for n in coefficients(m, where))
        if name not in allowed:
            hint = f"allowed: {', '.join(allowed)}" if allowed else "it has none"
            yield f"{where}.{name}: not a coefficient of {' or '.join(m.name for m in candidates)}; {hint}"


def bounds_problems(given: Given, method: Method) -> Iterator[str]:
    """Values and bounds that the method does not allow."""
    for (where, name), axis in given.items():
        if problem := bounds_problem(name, axis, method.knobs[name]):
            yield f"{where}.{name}: {problem}"


def bounds_problem(name: str, axis: Axis, knob: Knob) -> str | None:
    """What is wrong with one coefficient's value or bounds; None if nothing is."""
    if axis.choice is not None:
        return f"{axis.choice!r} is not {choices_of(knob)}"
    if is_named(knob) and (axis.low != axis.high or axis.low not in values_of(knob)):
        return f"is never searched; give {choices_of(knob)}"
    if axis.low < knob.low or axis.high > knob.high:
        return f"bounds {axis.low:g} to {axis.high:g} are not within {knob.low:g} to {knob.high:g}"
    if name == "density" and axis.low <= 0:
        return "a density of 0 keeps nothing; the lower bound must be above 0"
    return None


def missing_problems(given: Given, method: Method, sources: Sequence[str]) -> Iterator[str]:
    """Coefficients without a default that are not given, neither for all sources nor for each of them."""
    for name, knob in method.knobs.items():
        if knob.default is not None or ("space", name) in given:
            continue
        if not knob.each or any((f"space.sources.{source}", name) not in given for source in sources):
            yield f"space.{name}: {method.name} needs it; give bounds [low, high] or a number"


def excluded_problems(given: Given, method: Method) -> Iterator[str]:
    """Coefficients that another one makes meaningless."""
    for switch, name in method.excludes.items():
        on, moved = given.get(("space", switch)), given.get(("space", name))
        if on and on.high and moved and (moved.low, moved.high) != (method.knobs[name].default,) * 2:
            yield f"space.{name}: has no meaning beside {switch}; leave out one of them"
