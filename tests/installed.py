"""Use evomerge as somebody who has only installed it: python tests/installed.py PYTHON

PYTHON: the interpreter of an environment into which the wheel was installed.  The commands run in a new folder outside
of this repository, on the tiny family (`.cache/tiny`, trained if it is not there), and find no compiler.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("cat", "env", "uname")  # all that is on the PATH; evomerge's guard of a compiler needs `cat` and `env`
AS_FOR_LARGE_MODELS = """
import evomerge.merge.kernels.compiled as compiled
from evomerge.cli import main
compiled.WORTHWHILE = 1
main()
"""  # kernels are compiled only for models that are larger than the tiny ones


def main(python: Path) -> None:
    family = ROOT / ".cache" / "tiny"
    subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "make.py", family], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        for program in PROGRAMS:
            (folder / "bin" / program).symlink_to(shutil.which(program) or program)
        write_inputs(folder, family)
        evomerge = python.parent / "evomerge"
        where = call(folder, python, "-c", "import evomerge; print(evomerge.__file__)")
        expect("site-packages" in where, f"not the installed package: {where}")
        print(call(folder, evomerge, "--version"), where)
        said = call(folder, python, "-c", AS_FOR_LARGE_MODELS, "merge", "recipe.yaml", "--out", "merged")
        expect("measured without a compiler" in said, f"merge says nothing of the missing compiler:\n{said}")
        print(next(line for line in said.splitlines() if "without a compiler" in line))
        call(folder, evomerge, "merge", "recipe.yaml", "--out", "again")
        same = (folder / "merged/model.safetensors").read_bytes() == (folder / "again/model.safetensors").read_bytes()
        expect(same, "the two merges differ")
        call(folder, evomerge, "search", "search.yaml", "--no-check")
        report = (folder / "runs" / "small" / "report.html").read_text(encoding="utf-8")
        expect("<script>" in report and "<style>" in report, "the report lacks its script or its style")
        print("merge, search and report work without a compiler")


def write_inputs(folder: Path, family: Path) -> None:
    """A recipe and a short search over two of the tiny family, with a task's files beside them."""
    recipe = {
        "base": {"path": str(family / "base")},
        "sources": [{"name": s, "path": str(family / s)} for s in ("rev", "add")],
        "method": "ties",
        "parameters": {"weight": 0.5, "density": 0.6},
    }
    search = {
        "name": "small",
        "base": str(family / "base"),
        "sources": recipe["sources"],
        "method": "task_arithmetic",
        "space": {"weight": [0.0, 1.5]},
        "tasks": [{"task": "add.yaml"}],
        "splits": {"search": 12, "selection": 10, "holdout": 20},
        "budget": {"trials": 8},
        "dtype": "float32",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "search.yaml").write_text(yaml.safe_dump(search), encoding="utf-8")
    for file in ("add.yaml", "add.jsonl"):
        shutil.copy(ROOT / "evals" / "tiny" / file, folder)


def call(folder: Path, *command: str | Path) -> str:
    """Run a command in the folder; what it printed.  It ends this script if the command fails."""
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    expect(done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return (done.stdout + done.stderr).strip()


def expect(true: bool, message: str) -> None:
    """End this script with a message if something is not true."""
    if not true:
        sys.exit(message)


if __name__ == "__main__":
    main(Path(os.path.abspath(sys.argv[1])))
