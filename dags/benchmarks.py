"""Public benchmarks: several models, one run.

questions → answers of each model ─┬→ MT-Bench and AlpacaEval judges ─┬→ scores
          └→ floors ───────────────┴→ IFEval checkers ────────────────┘
"""

from __future__ import annotations

from ray_pipeline.bench.stages import Answering, benchmark_stages
from ray_pipeline.benchmark_config import BenchmarksConfig
from ray_pipeline.graph.stage import Dag


def benchmarks(config: BenchmarksConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    measured = {name: Answering(model) for name, model in config.measured().items()}
    return Dag(
        "benchmarks",
        benchmark_stages(config.benchmarks, config.page(), config.judges, measured),
    )
