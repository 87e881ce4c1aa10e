"""What each workflow is configured by, under the name that `quorum run` takes."""

from __future__ import annotations

from typing import Any

from ray_pipeline.agreement_config import AGREEMENT_CONFIGS
from ray_pipeline.benchmark_config import BenchmarksConfig
from ray_pipeline.config import CONFIGS
from ray_pipeline.fellowship_config import FELLOWSHIP_CONFIGS

WORKFLOWS: dict[str, type[Any]] = {
    **CONFIGS,
    **FELLOWSHIP_CONFIGS,
    **AGREEMENT_CONFIGS,
    "benchmarks": BenchmarksConfig,
}
