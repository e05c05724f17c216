"""Read, check and write the configuration file.  All its problems are reported together, before anything is loaded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ValidationError

from evomerge.config.database_url import has_password, masked
from evomerge.config.paths import absolute_paths, path_problems
from evomerge.config.running import BudgetConfig, PriceConfig, RacingConfig, SamplerConfig, WorkersConfig
from evomerge.config.schema import SearchConfig, SourceConfig
from evomerge.config.space import LayersConfig, SpaceConfig
from evomerge.config.tasks import GuardConfig, PythonTask, SplitsConfig, TaskConfig, TaskOptions
from evomerge.errors import EvomergeError, did_you_mean
from evomerge.files import read_yaml, write_text
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import choices_of, is_named, values_of
from evomerge.merge.methods.method import Method
from evomerge.sources.tokenizer import VOCABULARY_CHOICES

SECTIONS: dict[str, type[BaseModel]] = {
    "": SearchConfig, "sources": SourceConfig, "tasks": TaskConfig, "guards": GuardConfig, "splits": SplitsConfig,
    "task": PythonTask, "sampler": SamplerConfig, "budget": BudgetConfig, "price": PriceConfig,
    "workers": WorkersConfig, "racing": RacingConfig, "layers": LayersConfig,
}  # fmt: skip
"""Where a key of the file stands -> the keys that may stand there."""


class Problems(Protocol):
    """Finds problems of a configuration.  others: whether there are others, so that guesses are welcome."""

    def __call__(self, config: SearchConfig, others: bool) -> list[str]: ...


def no_more(config: SearchConfig, others: bool) -> list[str]:
    """No problems."""
    return []


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
    problems = []
    names = [s.name for s in config.sources]
    least, most = method.sources
    if not least <= len(names) <= (most or len(names)):
        allowed = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
        problems.append(f"sources: {method.name} takes {allowed}, here are {len(names)}")
    if method.statistics:
        problems += [
            f"sources.{i}.statistics: {method.name} needs a file there; make it with "
            f"`evomerge statistics --kind {method.statistics}`"
            for i, s in enumerate(config.sources)
            if s.statistics is None
        ]
    given = {("space", knob): a for knob, a in config.space.axes(method).items()}
    for source, knobs in config.space.sources.items():
        given |= {(f"space.sources.{source}", knob): a for knob, a in knobs.items()}
    for where, name in list(given):
        if name not in coefficients(method, where):
            del given[where, name]
            allowed_names = dict.fromkeys(n for m in candidates for n in coefficients(m, where))
            if name not in allowed_names:
                hint = f"allowed: {', '.join(allowed_names)}" if allowed_names else "it has none"
                every = " or ".join(m.name for m in candidates)
                problems.append(f"{where}.{name}: not a coefficient of {every}; {hint}")
    for (where, name), bounds in given.items():
        knob = method.knobs[name]
        if bounds.choice is not None:
            problems.append(f"{where}.{name}: {bounds.choice!r} is not {choices_of(knob)}")
        elif is_named(knob) and (bounds.low != bounds.high or bounds.low not in values_of(knob)):
            problems.append(f"{where}.{name}: is never searched; give {choices_of(knob)}")
        elif bounds.low < knob.low or bounds.high > knob.high:
            problems.append(
                f"{where}.{name}: bounds {bounds.low:g} to {bounds.high:g} are not within {knob.low:g} to {knob.high:g}"
            )
        elif name == "density" and bounds.low <= 0:
            problems.append(f"{where}.{name}: a density of 0 keeps nothing; the lower bound must be above 0")
    for name, knob in method.knobs.items():
        if knob.default is None and ("space", name) not in given:
            lacking = [n for n in names if (f"space.sources.{n}", name) not in given] if knob.each else ["all"]
            if lacking:
                problems.append(f"space.{name}: {method.name} needs it; give bounds [low, high] or a number")
    for switch, name in method.excludes.items():
        on, moved = given.get(("space", switch)), given.get(("space", name))
        if on and on.high and moved and (moved.low, moved.high) != (method.knobs[name].default,) * 2:
            problems.append(f"space.{name}: has no meaning beside {switch}; leave out one of them")
    ordered = config.space.order and method.ordered is not None and len(names) >= method.ordered
    if not any(a.low < a.high for a in given.values()) and not ordered and not problems:
        fixed = f"every coefficient of {method.name}" if len(candidates) > 1 else "every coefficient"
        hint = "leave it out" if len(candidates) > 1 else "use `evomerge merge` instead"
        problems.append(f"space: {fixed} is fixed, there is nothing to search; {hint}")
    return problems


def coefficients(method: Method, where: str) -> list[str]:
    """The coefficients of a method that may stand in a mapping of the file.  where: its YAML path."""
    return [name for name, knob in method.knobs.items() if where == "space" or knob.each]


def type_problems(config: SearchConfig) -> list[str]:
    """The problem with a `compute_dtype` that would round the candidate's values once more."""
    if config.compute_dtype in ("auto", "float32", config.dtype):
        return []
    allowed = " or ".join(dict.fromkeys(("auto", "float32", config.dtype)))
    return [f"compute_dtype: {config.compute_dtype} cannot hold the values of dtype {config.dtype}; give {allowed}"]


def vocabulary_problems(config: SearchConfig) -> list[str]:
    """The problem with a `vocabulary` that is none of the models'."""
    names = [s.name for s in config.sources]
    if config.vocabulary is None or [*VOCABULARY_CHOICES, *names].count(config.vocabulary) == 1:
        return []
    allowed = ", ".join([*VOCABULARY_CHOICES, *names])
    return [f"vocabulary: {config.vocabulary!r} is not one (alone) of {allowed}"]


def guard_problems(config: SearchConfig) -> list[str]:
    """The problems with guards: references that do not exist, and options that differ from those of the same task."""
    models = ["base", *(s.name for s in config.sources)]
    goals = {task.task: task for task in config.tasks}
    problems = []
    for i, guard in enumerate(config.guards):
        if guard.of not in models:
            problems.append(f"guards.{i}.of: there is no model {guard.of!r}; give {' or '.join(models)}")
        goal = goals.get(guard.task)
        for name, field in TaskOptions.model_fields.items():
            value = getattr(guard, name)
            if goal is not None and value not in (getattr(goal, name), field.default):
                problems.append(f"guards.{i}.{name}: give it in `tasks`, which lists the same task")
    return problems


def with_start(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the base, the sources and the method of `start_from` where it does not give them itself.

    EvomergeError if that is no recipe, mergekit file or run folder, or if a search cannot start from it.
    """
    start = content.get("start_from")
    if not isinstance(start, str) or {"base", "sources", "method"} <= content.keys():
        return content
    space = content.get("space")
    any_layers = isinstance(space, dict) and bool(space.get("layers"))
    return (of_run(Path(start)) if os.path.isdir(start) else of_file(Path(start), any_layers)) | content


def of_run(folder: Path) -> dict[str, Any]:
    """The base, the sources and the method of an earlier run, as a configuration has them."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise EvomergeError(f"start_from: {folder} is no run folder (it has no config.yaml)")
    earlier = load_config(file).model_dump(by_alias=True, exclude_none=True)
    keys = ("base", "sources", "method", "allow_differences", "vocabulary")
    return {key: earlier[key] for key in keys if key in earlier}


def of_file(file: Path, any_layers: bool) -> dict[str, Any]:
    """The base, the sources and the method of a recipe or mergekit file, as a configuration has them.

    any_layers: whether the recipe may have slices, because layers are searched.
    """
    from evomerge.merge.mergekit.load_merge import load_merge  # opens models, for which it needs torch

    recipe, _ = load_merge(file)
    if recipe.slices and not any_layers:
        raise EvomergeError(f"{file}: a search cannot start from slices, unless it is one for layers (`space.layers`)")
    sources: list[dict[str, Any]] = []
    for s in recipe.sources:
        origin = {"recipe": s.recipe.model_dump(mode="json")} if s.recipe else {"path": s.path}
        sources.append({"name": re.sub(r"[^A-Za-z0-9_-]", "-", s.name), **origin})
    given = {"base": recipe.base.path, "sources": sources, "method": recipe.method}
    if recipe.vocabulary:
        named = {s.name: own["name"] for s, own in zip(recipe.sources, sources, strict=True)}
        given["vocabulary"] = named.get(recipe.vocabulary, recipe.vocabulary)
    if recipe.allow_differences:
        given["allow_differences"] = recipe.allow_differences
    return given


def readable(error: dict[str, Any]) -> str:
    """One pydantic error as a line: the YAML path, the problem, the value."""
    place = [part for part in error["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))]
    where = ".".join(map(str, place))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        names = [part for part in place if isinstance(part, str)]
        section = SECTIONS.get(names[-2] if len(names) > 1 else "")
        return f"{where}: unknown key" + did_you_mean(names[-1], section.model_fields if section else ())
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["loc"][0] == "storage":  # the value may contain a password
        return f"{where}: {message}"
    shown = repr(error.get("input"))
    allowed = re.findall("'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
    hint = did_you_mean(str(error.get("input")), allowed) if error["type"] == "literal_error" else ""
    return f"{where}: {message}" + (f" (found {shown})" if len(shown) < 60 else "") + hint


def parse_config(content: Any, origin: Path, more: Problems = no_more, files: bool = True) -> SearchConfig:
    """Check parsed YAML as a search configuration.

    origin: the file, named in the error; relative paths are relative to its folder.
    more: finds problems that this package knows nothing of; `others` says whether there are others.
    files: whether the models and files that it names must be there; to read about a finished search they need not.

    EvomergeError lists all problems, each with its YAML path.
    """
    if not isinstance(content, dict):
        raise EvomergeError(f"{origin}: expected a mapping of keys to values, found {type(content).__name__}")
    content = with_start(absolute_paths(content, origin.parent.resolve()))
    problems: list[str] = []
    try:
        config = SearchConfig.model_validate(content)
        problems = method_problems(config) + type_problems(config) + vocabulary_problems(config)
        problems += guard_problems(config) + (path_problems(config) if files else [])
        problems += more(config, bool(problems))
    except ValidationError as error:
        problems = [readable(dict(e)) for e in error.errors()]
        # The other keys are checked too, so that one run of the command shows all problems.
        bad = {e["loc"][0] for e in error.errors() if e["loc"]}
        rest = {k: v for k, v in content.items() if k not in bad}
        stand_ins = {"name": "x", "base": str(origin.parent), "method": "", "tasks": [{"task": "x"}]}
        stand_ins["sources"] = [{"name": "x", "path": str(origin.parent)}]
        try:
            partial = SearchConfig.model_validate({**stand_ins, **rest})
            if not bad & {"method", "sources", "space"}:
                problems += method_problems(partial)
            problems += (path_problems(partial) if files else []) + more(partial, True)
        except ValidationError:
            pass
    if problems:
        raise EvomergeError(f"{origin}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return config


def load_config(path: Path, more: Problems = no_more, files: bool = True) -> SearchConfig:
    """Read a search configuration from a file.

    more, files: as in `parse_config`.

    EvomergeError lists all problems, each with its YAML path.
    """
    return parse_config(read_yaml(path), path, more, files)


def dump_config(config: SearchConfig) -> str:
    """The configuration as YAML that `load_config` reads back, with absolute paths."""
    text: str = yaml.safe_dump(config.model_dump(by_alias=True, exclude_none=True), sort_keys=False, width=110)
    return text


def write_config(path: Path, config: SearchConfig) -> None:
    """Write the configuration to a file, which only its owner can read if it may contain a password."""
    write_text(path, dump_config(config), private=has_password(config.storage) or config.on_finish is not None)


def config_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """The differences of two configurations in the keys that decide a study's results, as `key: old -> new` lines.

    The budget, `simplify`, the price, the limits of workers, `on_finish`, `log_to` and the table of hub commits may
    differ, and so may the method that was chosen from a list.  Passwords are not shown.
    """
    chosen = {"method"} if old.methods and new.methods else set()
    free = {"budget", "simplify", "price", "workers", "hub", "on_finish", "log_to"} | chosen
    before, after = (flatten(c.model_dump(by_alias=True, exclude_none=True, exclude=free)) for c in (old, new))

    def shown(key: str, values: dict[str, Any]) -> str:
        value = str(values.get(key, "(absent)"))
        return masked(value) if key == "storage" else value

    return [
        f"{key}: {shown(key, before)} -> "
        + (shown(key, after) if shown(key, before) != shown(key, after) else "the same with another password")
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with keys like `sources.0.path`."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): value}
