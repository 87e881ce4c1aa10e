"""Win rates of configurations against baselines.

recorded verdicts ─────────────────────────────────────→ winrate

prompts ─┬→ each model alone ──┬→ versus (one judge) ──→ winrate
         └→ its feedback loops ┘
"""

from __future__ import annotations

from ray_pipeline.agreement.stages import items_stage, report_stage
from ray_pipeline.agreement.versus import versus_stages
from ray_pipeline.agreement_config import WinrateConfig
from ray_pipeline.data.columnar import prompts
from ray_pipeline.graph.stage import Dag


def winrate(config: WinrateConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    if config.live is None:
        assert config.data is not None
        items = items_stage(config.data)
        return Dag("winrate", [items, report_stage(config.page(), items)])
    asked = prompts(config.live.prompts)
    answering, compared = versus_stages(config.live, config.models, asked)
    return Dag("winrate", [asked, *answering, compared, report_stage(config.page(), compared)])
