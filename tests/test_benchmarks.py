"""Every benchmark can be started: none names what is not there any more."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from searches import ROOT

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_a_benchmark_finds_all_that_it_imports(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    before = dict(sys.modules)
    spec = spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, spec.name, module := module_from_spec(spec))
    spec.loader.exec_module(module)
    for name in sys.modules.keys() - before.keys():  # the benchmarks' own modules may have names of other tests'
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(file.parent)):
            del sys.modules[name]
