"""Matching of label selectors with the nodes of a cluster, by Ray's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SET = re.compile(r"^(!?)in\((.*)\)$")


def may_run(label_selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector by Ray's rules: `v`, `!v`, `in(a, b)`, `!in(a, b)`."""
    for name, condition in label_selector.items():
        value = labels.get(name)
        several = _SET.match(condition)
        if several:
            named = value in [item.strip() for item in several[2].split(",")]
            holds = not named if several[1] else named
        elif condition.startswith("!"):
            holds = value != condition[1:]
        else:
            holds = value == condition
        if not holds:
            return False
    return True
