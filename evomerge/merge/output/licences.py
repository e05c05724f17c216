"""The licences of merged models: which one a merge has, and what does not fit together.

This reads what model cards state.  It is a reminder to look, no legal advice.
"""

import re
from collections.abc import Mapping

IDENTIFIER = re.compile(r"[\w.+-]{1,100}")  # what the hub takes for a licence
NOT_STATED = "not stated"
PERMISSIVE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "unlicense",
    "wtfpl", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "pddl", "odc-by", "afl-3.0", "ecl-2.0",
)  # fmt: skip
"""Identifiers of the hub for licences that ask for little more than to be named."""

SAME_TERMS = ("gpl", "agpl", "lgpl", "cc-by-sa", "cc-by-nc-sa", "osl", "eupl", "mpl", "odbl")
"""Beginnings of licences whose changed versions must have the same licence."""


def licence(card: dict[str, object]) -> str:
    """The licence in the front matter of a model card, or `not stated`."""
    value = card.get("license") or card.get("license_name")
    name = card.get("license_name")
    if value == "other" and name:
        value = name
    return str(value) if value else NOT_STATED


def licence_of_merge(licences: Mapping[str, str]) -> str:
    """The licence of a merge for its front matter: that of all models, or the only one that is not permissive.

    licences: model -> its licence.
    """
    found = {text if text == NOT_STATED or IDENTIFIER.fullmatch(text) else "other" for text in licences.values()}
    strict = sorted(found - set(PERMISSIVE))
    if len(found) == 1 and NOT_STATED not in found:
        return found.pop()
    return strict[0] if len(strict) == 1 and NOT_STATED not in strict else "other"


def licence_warnings(licences: Mapping[str, str]) -> list[str]:
    """What to look at before a merge is published, one sentence each.  licences: model -> its licence."""
    found = []

    def models(names: list[str]) -> str:
        return ", ".join(f"{name} ({licences[name]})" for name in names)

    silent = [name for name, text in licences.items() if text == NOT_STATED]
    stated = {name: text.lower() for name, text in licences.items() if text != NOT_STATED}
    if silent:
        found.append(f"{', '.join(silent)}: no licence is stated; ask the owner before this merge is published.")
    if no_changes := [name for name, text in stated.items() if "-nd" in text]:
        found.append(f"{models(no_changes)}: changed versions, such as this merge, must not be published.")
    if no_trade := [name for name, text in stated.items() if "-nc" in text]:
        found.append(f"{models(no_trade)}: so the merge must not be used commercially either.")
    same_terms = [name for name, text in stated.items() if text.startswith(SAME_TERMS)]
    kinds = {stated[name] for name in same_terms}
    others = [name for name, text in stated.items() if text not in PERMISSIVE and text not in kinds]
    if len(kinds) > 1 or (kinds and others):
        found.append(
            f"{models([*same_terms, *others])} do not fit together: each wants its own terms for the whole merge."
        )
    elif len({stated[name] for name in others}) > 1:
        found.append(f"{models(others)} have different terms; the merge has to keep all of them.")
    return found
