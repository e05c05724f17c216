"""The differences of two configurations in what decides a study's results."""

from typing import Any

from evomerge.config.database_url import masked
from evomerge.config.schema import SearchConfig

FREE = {"budget", "simplify", "price", "workers", "hub", "on_finish", "log_to"}
"""The keys that decide no result of a trial."""


def config_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """The differences of two configurations in the keys that decide a study's results, as `key: old -> new` lines.

    The keys in FREE may differ, and so may the method that was chosen from a list.  Passwords are not shown.
    """
    free = FREE | ({"method"} if old.methods and new.methods else set())
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
