"""A workflow of your own: only prompts and candidates.

quorum run examples/my_workflow.py --config examples/my_workflow.yaml
"""

from collections.abc import Sequence

from ray_pipeline import register
from ray_pipeline.data.candidates import CandidateSettings, candidates
from ray_pipeline.data.prompts import PromptsConfig, prompts
from ray_pipeline.engines.models import ModelUse
from ray_pipeline.graph.stage import Dag
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.registry import Workflow


class SampleConfig(RunConfig):
    prompts: PromptsConfig = PromptsConfig()
    candidates: CandidateSettings = CandidateSettings()

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards

    def uses(self) -> Sequence[ModelUse]:
        model, sampling = self.candidates.model, self.candidates.sampling
        return [ModelUse("candidates.model", model, "generate", "candidates.sampling", sampling.extra)]


def wire(config: SampleConfig, run_folder: str) -> Dag:
    source = prompts(config.prompts)
    return Dag("sample", [source, candidates(config.candidates, config.models, source)])


register("workflow", "sample")(Workflow(name="sample", config=SampleConfig, wire=wire))
