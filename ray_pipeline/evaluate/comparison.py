"""The input of the report of several training methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.data.row_truth import RowTruth
from ray_pipeline.evaluate.data import StageUse
from ray_pipeline.evaluate.method_stats import Difference, MethodStats, PolicyStats


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything on the page.

    Attributes:
        data: name of each dataset → how it was made, in a few words.
        truth: name of a dataset → how its rows compare with a checker's verdicts.
        facts: further context for the table (judge, prompts, seeds …), in order.
        warnings: full sentences.
        stage_use, fingerprints: usage and fingerprint of each stage.
        config: the configuration as resolved.
    """

    name: str
    policies: Sequence[PolicyStats]
    methods: Sequence[MethodStats]
    differences: Sequence[Difference]
    data: Mapping[str, str]
    truth: Mapping[str, RowTruth]
    facts: Mapping[str, str]
    warnings: Sequence[str]
    stage_use: Sequence[StageUse] = ()
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None
