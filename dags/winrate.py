"""Win rates: recorded pairwise verdicts of configurations against baselines → the table of win rates.

items → winrate
"""

from __future__ import annotations

from ray_pipeline.agreement_config import WinrateConfig
from ray_pipeline.graph.stage import Dag
from ray_pipeline.stages.agreement import items_stage, report_stage


def winrate(config: WinrateConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    items = items_stage(config.data)
    return Dag("winrate", [items, report_stage(config.page(), items)])
