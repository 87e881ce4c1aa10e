"""The models of a configuration, whatever shape its workflow gives them."""

from __future__ import annotations

import pytest

from ray_pipeline.config.loading import load_config
from ray_pipeline.operate.prices import budget_of
from ray_pipeline.pocket import ADAPTERS
from ray_pipeline.workflow.registry import find_workflow


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("dmapo", {"models.policy", "models.judge", *(f"models.{name}" for name in ADAPTERS)}),
        ("fellowship", {"models.generator", "models.reviewer", "models.judge"}),
        ("benchmarks", {"models.base", "judges.judge"}),
        ("agreement", set()),
    ],
)
def test_every_workflow_can_be_priced(name: str, models: set[str]) -> None:
    file = {"dmapo": "pocket", "agreement": "agreement"}.get(name, f"pocket_{name}")
    # IFEval wants data that is not everywhere.
    changes = {"agreement": ["data.path=nowhere.jsonl"], "benchmarks": ["benchmarks.ifeval=null"]}.get(name, [])
    settings = load_config(find_workflow(name).config, f"configs/{file}.yaml", changes)
    assert set(settings.served()) == models
    assert budget_of(settings, 5.0, 2.5).max_cost == 5.0
