"""The models of a configuration, whatever shape its workflow gives them."""

from __future__ import annotations

import pytest

from ray_pipeline.agreement_config import AGREEMENT_CONFIGS
from ray_pipeline.benchmark_config import BenchmarksConfig
from ray_pipeline.config import CONFIGS, load_config, served_models
from ray_pipeline.fellowship_config import FELLOWSHIP_CONFIGS
from ray_pipeline.operate.prices import budget_of


@pytest.mark.parametrize(
    ("dag", "config", "names"),
    [
        ("dmapo", CONFIGS["dmapo"], {"policy", "judge"}),
        ("fellowship", FELLOWSHIP_CONFIGS["fellowship"], {"generator", "reviewer", "judge"}),
        ("benchmarks", BenchmarksConfig, {"base", "judge"}),
        ("agreement", AGREEMENT_CONFIGS["agreement"], set()),
    ],
)
def test_every_workflow_can_be_priced(dag: str, config: type, names: set[str]) -> None:
    file = {"dmapo": "pocket", "agreement": "agreement"}.get(dag, f"pocket_{dag}")
    # IFEval wants data that is not everywhere.
    changes = {"agreement": ["data.path=nowhere.jsonl"], "benchmarks": ["benchmarks.ifeval=null"]}.get(dag, [])
    settings = load_config(dag, f"configs/{file}.yaml", changes, config)
    assert set(served_models(settings)) == names
    assert budget_of(settings, 5.0, 2.5).max_cost == 5.0
