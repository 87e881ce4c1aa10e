"""Checks of all that can be known before a run pays for anything, as one list (`CHECKS`).

`quorum check` and `quorum run` make the same checks, `--dry-run` those that take no time.
They look at the stages that are still to do and at nothing else: a finished run contacts no endpoint.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from ray_pipeline.graph.driver import Before
from ray_pipeline.graph.reach import in_a_job
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Stage, StageResult
from ray_pipeline.operate.canary import endpoints, engines
from ray_pipeline.operate.check_cards import judge_cards
from ray_pipeline.operate.check_data import training_rows
from ray_pipeline.operate.check_files import disk, folders, inputs, models
from ray_pipeline.operate.check_gate import rubrics, thresholds
from ray_pipeline.operate.pending import Finding, Pending
from ray_pipeline.training.methods import TrainingInputError
from ray_pipeline.training.spec import POLICIES, TrainSpec
from ray_pipeline.workflow.config import RunConfig


class CheckFailed(ValueError):
    """A check found a problem; the message names each, with its remedy."""


def findings(pending: Pending) -> Iterator[Finding]:
    """Make all checks, one after the other."""
    with tempfile.TemporaryDirectory(prefix="quorum-check-") as scratch:
        pending = dataclasses.replace(pending, scratch=scratch)
        for check in CHECKS:
            yield from check(pending)


def before_first_stage(config: RunConfig, session: Session, on_cluster: bool) -> Before:
    """What a run does before its first stage (`execute(before=…)`): all checks, on its stages to do.

    Raises, when called:
        CheckFailed: something will not work; nothing was started.
    """

    def before(todo: Sequence[Stage], results: Mapping[str, StageResult], say: Callable[[str], None]) -> None:
        for line in config.remarks():
            say(line)
        found = []
        for finding in findings(Pending(config, session, todo, results, on_cluster=on_cluster)):
            found.append(finding)
            if finding.state != "ok":
                say(finding.line)
        say(f"checked before the first stage: {sum(finding.state == 'ok' for finding in found)} ok")
        if problems := [finding for finding in found if finding.state == "problem"]:
            raise CheckFailed(
                f"nothing was started: {'; '.join(f'{problem.what}: {problem.detail}' for problem in problems)}"
            )

    return before


def engines_elsewhere(config: RunConfig, executor: str = "ray") -> bool:
    """Whether engines may run on other machines than this one, with another environment."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS") or "local"
    return executor == "ray" and (in_a_job() or address != "local")


def training(pending: Pending) -> Iterator[Finding]:
    """Settings, packages (`report_to`) and model of every training. What is checked is in `training.preflight`; of
    trainings that differ only in what they read and where they write, the first one is checked."""
    known: list[tuple[TrainSpec, Finding]] = []
    for stage in pending.todo:
        if stage.role_name not in POLICIES:
            continue
        if pending.scope == "light":
            yield Finding(f"training {stage.name}", "not checked", "needs the training packages; run `quorum check`")
            continue
        from ray_pipeline.policy.train import training_spec

        spec = training_spec(stage, pending.session.folder)
        alike = dataclasses.replace(spec, train_files="", output_dir="", storage_path="", run_name="")
        found = next((found for other, found in known if other == alike), None)
        if found is None:
            found = _checked_training(spec)
            known.append((alike, found))
        yield dataclasses.replace(found, what=f"training {stage.name}")


def _checked_training(spec: TrainSpec) -> Finding:
    from ray_pipeline.training.preflight import check_model, check_spec

    try:
        check_spec(spec)
        check_model(spec)
    except TrainingInputError as error:
        return Finding("training", "problem", str(error))
    except OSError as error:  # a model of the Hub, without a network
        return Finding("training", "not checked", f"{spec.model} cannot be read here ({error})")
    return Finding("training", "ok", "the size of the cluster is checked when it starts")


#: In the order in which they are made: what costs nothing first.
CHECKS: tuple[Callable[[Pending], Iterator[Finding]], ...] = (
    folders,
    rubrics,
    thresholds,
    judge_cards,
    inputs,
    models,
    training,
    disk,
    training_rows,
    endpoints,
    engines,
)
