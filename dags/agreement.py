"""Agreement: items with human labels → verdicts, recorded or asked live → how far they agree.

items ─┬→ judges, one stage a model ──┐
       ├→ debates, one stage a model ─┴→ agreement
       └→ recorded verdicts ──────────┘
"""

from __future__ import annotations

from ray_pipeline.agreement.ask import ask_stages
from ray_pipeline.agreement.stages import items_stage, report_stage
from ray_pipeline.agreement_config import AgreementConfig
from ray_pipeline.graph.stage import Dag


def agreement(config: AgreementConfig, run_folder: str) -> Dag:
    """The workflow as a DAG."""
    items = items_stage(config.data)
    strategies, debates = config.strategy_templates(), config.debate_templates()
    asked = ask_stages(config.ask, strategies, debates, config.models, items)
    return Dag("agreement", [items, *asked, report_stage(config.page(), items, asked)])
