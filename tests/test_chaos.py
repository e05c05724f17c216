"""The short form of tests/chaos.py: one moment each of the injections that cost seconds."""

from pathlib import Path

import pytest
from chaos import disturb
from disturbances import QUICK

SEED = 11
pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the undisturbed run too."""
    return tmp_path_factory.mktemp("searches")


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_disturbed_search_loses_nothing(name: str, tiny_family: Path, folder: Path) -> None:
    what = disturb(name, SEED, tiny_family, folder)
    if what.startswith("not tried"):
        pytest.skip(what)
