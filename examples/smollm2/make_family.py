"""The whole example family: the base, then one specialist per skill; what is finished already is left alone.

    python examples/smollm2/make_family.py OUT

Writes OUT/base and OUT/math, OUT/shell, OUT/denum, OUT/calendar. The other scripts name a folder only when
it is complete, so a run that was cut off goes on with the first folder that is missing.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from skills import SKILLS

HERE = Path(__file__).parent


def run(script: str, *arguments: str) -> None:
    """One step in a process of its own: the memory of a training does not pile up on the next."""
    command = [sys.executable, str(HERE / script), *arguments]
    print("$", *command, flush=True)
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(f"{script} failed with {finished.returncode}; finished folders are kept, start again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base model and its four specialists.")
    parser.add_argument("out", type=Path, help="folder of the family")
    parser.add_argument("--steps", type=int, help="training steps for every skill instead of the defaults")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    base = out / "base"
    training = ["--seed", str(options.seed)]
    if options.steps is not None:
        training += ["--steps", str(options.steps)]
    for name in ("base", *SKILLS):
        if (out / name).exists():
            print(f"{out / name} is there already")
        elif name == "base":
            run("fetch_base.py", str(base))
        else:
            run("train_lora.py", str(base), name, str(out / name), *training)


if __name__ == "__main__":
    main()
