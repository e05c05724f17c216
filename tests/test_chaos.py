"""The short form of tests/chaos.py: one moment each of the injections that cost seconds."""

from pathlib import Path

import pytest
from chaos import QUICK, one_night

SEED = 11
pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the undisturbed run too."""
    return tmp_path_factory.mktemp("nights")


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_disturbed_search_loses_nothing(name: str, tiny_family: Path, nights: Path) -> None:
    what = one_night(name, SEED, tiny_family, nights)
    if what.startswith("not tried"):
        pytest.skip(what)
