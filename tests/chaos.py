"""Chaos: real searches on the tiny family, disturbed at random seeded moments, resumed, and compared.

    python tests/chaos.py [--rounds 5] [--seed 0] [--only NAME ...] [--table FILE]

Every round does each injection once, at a moment drawn from the seed, and checks what no disturbance may change:
trials that were finished are there afterwards with the same parameters, value and item scores; numbers are unique and
without gaps; the search comes to its verdict; and with one worker trials, gradient steps and verdict are those of the
undisturbed run.  The kinds of injections are in `disturbances/`.
"""

import argparse
import collections
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disturbances import ALONE, INJECTIONS, Disturbed
from disturbances.disturbed import TRIALS, finished, gradient_steps, wait
from searches import ROOT, verdict_of


def disturb(name: str, seed: int, family: Path, folder: Path, long: bool = False) -> str:
    """Do an injection and check what must hold after it; what happened, in a few words."""
    own = folder / f"{''.join(c for c in name if c.isalnum())}-{seed}"
    own.mkdir()
    search = Disturbed(own, family, random.Random(f"{name} {seed}"))
    if long:
        search.suspended, search.outage = 60.0, 20.0
    what = INJECTIONS[name](search)
    if what.startswith("not tried"):
        return what
    after = search.trials or finished(search.run)
    assert len(after) == TRIALS, f"{len(after)} trials are finished"
    assert (search.run / "verdict.json").exists()
    if name in ALONE:
        wanted = undisturbed(family, search.changes, folder)
        assert after == finished(wanted), "trials are not those of the undisturbed run"
        if not search.trials:
            assert gradient_steps(search.run) == gradient_steps(wanted), "gradient steps are not the undisturbed run's"
        ours, theirs = comparable(search.run), comparable(wanted)
        other = {key: (ours.get(key), theirs[key]) for key in theirs if ours.get(key) != theirs[key]}
        assert not other, f"the verdict is not the undisturbed run's: {other}"
        what += "; the undisturbed run's trials and verdict"
    shutil.rmtree(own)
    return what


def comparable(run: Path) -> dict[str, Any]:
    """The verdict without the recipes' names, which are hashes that contain paths."""
    content = verdict_of(run)
    content["chosen"] = {k: v for k, v in content["chosen"].items() if k != "recipe"}
    return content


def undisturbed(family: Path, changes: dict[str, Any], folder: Path) -> Path:
    """The run folder of a search with these changes that nobody disturbs, made once."""
    changes = {k: v for k, v in changes.items() if k not in ("storage", "workers")}
    number = random.Random(json.dumps(changes, sort_keys=True)).getrandbits(64)
    own = folder / f"undisturbed-{number}"
    search = Disturbed(own, family, random.Random(0), changes)
    if not own.exists():
        own.mkdir()
        ended = wait(search.start())
        assert ended.returncode == 0, ended
    return search.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of injections")
    parser.add_argument("--table", type=Path, help="write the outcomes here (Markdown)")
    parser.add_argument("--family", type=Path, default=ROOT / ".cache" / "tiny")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "make.py", arguments.family], check=True)
    outcomes: dict[str, collections.Counter[str]] = {n: collections.Counter() for n in arguments.only or INJECTIONS}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            for name, outcome in outcomes.items():
                began = time.monotonic()
                try:
                    what = disturb(name, seed, arguments.family, Path(folder), long=seed == 0)
                except Exception as error:
                    what = f"WRONG: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}"
                    print(error, file=sys.stderr, flush=True)
                    wrong += 1
                outcome[what] += 1
                print(f"{name} ({seed}): {what} ({time.monotonic() - began:.0f} s)", flush=True)
    rows = [f"| {name} | {n} | {what} |" for name, found in outcomes.items() for what, n in sorted(found.items())]
    table = "\n".join(["| injection | times | outcome |", "|---|---:|---|", *rows])
    print(f"\n{sum(sum(o.values()) for o in outcomes.values())} injections, {wrong} wrong\n\n{table}")
    if arguments.table:
        arguments.table.write_text(table + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
