"""Results of a long benchmark in a file, so that it can be measured in parts."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Results:
    """A JSON file of results by key, written after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def once(self, key: str, work: Callable[[], Any]) -> None:
        """Do the work whose result is not there yet."""
        if key in self.found:
            return
        started = time.perf_counter()
        result = work()
        latest = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.found = latest | {key: result}  # another process may have written meanwhile
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{key}: {time.perf_counter() - started:.0f} s", flush=True)
