"""A training method of your own: IPO (Azar et al. 2023, arXiv:2310.12036), TRL's DPO trainer with another loss.

quorum run dmapo --config configs/pocket.yaml train.method=examples/my_method.py
"""

from ray_pipeline.extensions import register
from ray_pipeline.training.methods import FILE_ORDER, Method

register("method", "ipo")(
    Method(
        module="trl",
        config="DPOConfig",
        trainer="DPOTrainer",
        data="dpo",
        objective="(r_w − r_l − 1/(2β))², r = the mean of log π − log π_ref per token of the answer (eq. 17).",
        beta=0.1,
        fields=("disable_dropout",),
        settings={**FILE_ORDER, "loss_type": ["ipo"]},
        refuses={"loss_type": "another loss would not be IPO"},
    )
)
