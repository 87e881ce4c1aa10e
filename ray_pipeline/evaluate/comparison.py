"""What the report of several training methods is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.evaluate.data import StageUse
from ray_pipeline.evaluate.method_stats import Difference, MethodStats, PolicyStats


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything on the page.

    Attributes:
        data: name of each data set → how it was made, in a few words.
        truth: name of a data set → its rows held against a checker that knows the truth, as figures by name.
        facts: what else a reader needs to judge the table (judge, prompts, seeds …), in order.
        warnings: whole sentences.
        stage_use, fingerprints, config: what each stage took and is, and the configuration as resolved.
    """

    name: str
    policies: Sequence[PolicyStats]
    methods: Sequence[MethodStats]
    differences: Sequence[Difference]
    data: Mapping[str, str]
    truth: Mapping[str, Any]
    facts: Mapping[str, str]
    warnings: Sequence[str]
    stage_use: Sequence[StageUse] = ()
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
