"""A merge method that another installed package offers as an entry point works like a built-in one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import distributions
import pytest
import yaml
from models import write_family
from safetensors.torch import load_file
from searches import run_cli

from evomerge.errors import EvomergeError
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.registry import Methods, built_in
from evomerge.merge.recipe.recipe import load_recipe

PART_WAY = """
from evomerge.merge.methods.knobs import Knob
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs, measured):
    return Blend((knobs.shared["part"] / measured.count,) * measured.count, of_task_vectors=True)


METHOD = Method("part_way", {"part": Knob(0.5, 0.0, 1.0)}, plan)
"""


def install(folder: Path, name: str = "part-way", code: str = PART_WAY) -> Path:
    """Install a package that offers the method `part_way`; the folder for sys.path."""
    return distributions.install(
        folder, name, code, "evomerge.methods", {"part_way": f"{name.replace('-', '_')}:METHOD"}
    )


@pytest.fixture
def methods() -> Iterator[Methods]:
    """A copy of the registry, so that no other test sees what is looked up here."""
    yield Methods(METHODS)
    for module in ("part_way", "other"):
        sys.modules.pop(module, None)


def write_recipe(folder: Path, family: dict[str, Path], **content: object) -> Path:
    sources = [{"name": s, "path": str(family[s])} for s in ("one", "two")]
    file = folder / f"{content['method']}.yaml"
    file.write_text(yaml.safe_dump({"recipe": 1, "base": {"path": str(family["base"])}, "sources": sources} | content))
    return file


def test_a_method_of_another_package_merges(tmp_path: Path):
    family, packages = write_family(tmp_path / "models"), install(tmp_path / "packages")
    ours = write_recipe(tmp_path, family, method="task_arithmetic", parameters={"weight": 0.3})
    theirs = write_recipe(tmp_path, family, method="part_way", parameters={"part": 0.6})
    prelude = f"import sys; sys.path.insert(0, {str(packages)!r})"
    done = run_cli("merge", theirs, "--out", tmp_path / "theirs", prelude=prelude)
    assert done.returncode == 0, done.stderr
    assert run_cli("merge", ours, "--out", tmp_path / "ours").returncode == 0
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_file_is_registered_by_being_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "more_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part_way.py").write_text(PART_WAY)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(built_in("more_methods", [str(package)])) == ["part_way"]


def test_a_recipe_of_an_uninstalled_method_says_so(tmp_path: Path):
    recipe = write_recipe(tmp_path, write_family(tmp_path / "models"), method="part_way")
    with pytest.raises(EvomergeError, match=r"method: 'part_way' is not one of arcee_fusion, .*, uniform_soup$"):
        load_recipe(recipe)


def test_a_package_is_imported_only_when_its_method_is_named(
    methods: Methods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(install(tmp_path))
    assert methods["ties"].name == "ties"
    with pytest.raises(EvomergeError, match=r"part_way, passthrough.*; did you mean part_way\?"):
        methods["partway"]
    assert "part_way" not in sys.modules
    assert methods["part_way"].knobs.keys() == {"part"}
    assert "part_way" in methods


@pytest.mark.parametrize(("wrong", "near"), [("tie", "ties"), ("dare_tie", "dare_ties"), ("slrep", "slerp")])
def test_a_near_miss_gets_the_name_that_was_meant(methods: Methods, wrong: str, near: str):
    with pytest.raises(EvomergeError, match=f"'{wrong}' is not one of .*; did you mean {near}\\?"):
        methods[wrong]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", r"'part_way' of the package other cannot be loaded \(ModuleNotFoundError: No module"),
        ("METHOD = 'part_way'", "'part_way' of the package other is no `Method` of that name"),
        (PART_WAY.replace('"part_way"', '"way"'), "'part_way' of the package other is no `Method` of that name"),
    ],
)
def test_a_broken_package_is_named(
    methods: Methods, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(install(tmp_path, "other", code))
    with pytest.raises(EvomergeError, match=message):
        methods["part_way"]


def test_two_packages_with_the_same_method_are_refused(
    methods: Methods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(install(install(tmp_path), "other"))
    with pytest.raises(EvomergeError, match="'part_way' is in several packages: other, part-way"):
        methods["part_way"]
