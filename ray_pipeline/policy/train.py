"""Train: a policy from the training rows, by TRL inside Ray Train."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.identity import model_identity
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.content import find_same, record, take_over
from ray_pipeline.graph.stage import BadInput, Stage, StageStop, WholeInput, WholeWork
from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest
from ray_pipeline.store.locations import join
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.fit import fit
from ray_pipeline.training.methods import TrainingInputError, method_label, method_of
from ray_pipeline.training.spec import (
    PROGRESS,
    STOP,
    ModelNotWritten,
    Reference,
    TrainingStopped,
    TrainSettings,
    TrainSpec,
)

KTO_WEIGHTS = ("desirable_weight", "undesirable_weight")
METRICS = "train_metrics.parquet"


class _Given(Settings):
    train: TrainSettings
    model: ModelSettings
    max_length: int
    reference: Reference = "base"
    alike: dict[str, str] = Field(default_factory=dict)


#: Settings that affect how training runs but not its result.
_NOT_LEARNT = {
    "use_gpu",
    "cpus_per_worker",
    "label_selector",
    "resources",
    "autoscaling",
    "max_failures",
    "report_to",
    "save_steps",
}


def train(
    settings: TrainSettings,
    model: ModelSettings,
    max_length: int,
    datasets: Stage,
    *,
    name: str = "train",
    view: str = "policy",
    role: str = "policy",
    steps_of: Stage | None = None,
    alike: Iterable[str] = (),
    start: Stage | None = None,
    reference: Reference = "base",
) -> Stage:
    """One policy: `merged/` and `adapter/` as `train.save` says, and the metrics of every step.

    Args:
        datasets: the stage with `<kind>/train/*.parquet` in its folder, for the kind that the method learns from.
        name: of the stage, where a workflow trains several policies; all are in the group `train`.
        view: link in the run's folder that shows the newest of them; "" makes none.
        role: one of `training.spec.POLICIES`.
        steps_of: a stage like `datasets`; the policy takes the optimiser steps that it would take on those rows.
        alike: names of training stages of the run with the same settings, length and model: the policy of one of them
            is taken over if its rows turn out to be the same, too.
        start: an earlier training of the same model, LoRA shape and `save`, whose adapter is trained on; default: a
            new one.
        reference: see `TrainSpec`.
    """
    given = _Given(train=settings, model=model, max_length=max_length, reference=reference)
    stage = Stage(
        name=name,
        group="train",
        role=role,
        view=view,
        repeatable=False,
        version=2,  # 2: global_batch
        work=WholeWork(function=train_policy, settings=given, trains=True),
        config={
            **settings.decisive(exclude=_NOT_LEARNT),
            "max_length": max_length,
            "chat_template_args": model.chat_template_args,
            **({} if reference == "base" else {"reference": reference}),
        },
        inputs={
            "datasets": datasets,
            **({} if steps_of is None else {"steps of": steps_of}),
            **({} if start is None else {"start": start}),
        },
        external=model.weights(),
    )
    keys = {other: dataclasses.replace(stage, name=other).settings_key for other in alike if other != name}
    work = dataclasses.replace(stage.work, settings=given.model_copy(update={"alike": keys}))
    return dataclasses.replace(stage, work=work) if keys else stage


def training_spec(stage: Stage, run_folder: str) -> TrainSpec:
    """The training of a stage as far as it is known before its data and the cluster, for the checks before a run.

    A cluster that decides about GPUs (`use_gpu` is not set) is taken to have them.
    """
    settings: _Given = stage.work.settings
    train = settings.train
    known = train.model_copy(update={"use_gpu": True}) if train.use_gpu is None else train
    data, out = (join(run_folder, of.folder_name) for of in (stage.inputs["datasets"], stage))
    return _spec(settings, known, data, Folder(out), stage.fingerprint)


def _spec(settings: _Given, train: TrainSettings, data: str, out: Folder, fingerprint: str) -> TrainSpec:
    model = settings.model
    return TrainSpec(
        settings=train,
        model=model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        chat_template_args=model.chat_template_args,
        train_files=join(data, f"{method_of(train.method).data}/train/*.parquet"),
        output_dir=out.location,
        storage_path=out.uri("ray_train"),
        run_name=f"{method_label(train.method)}-{fingerprint}",
        max_length=settings.max_length,
        reference=settings.reference,
    )


def train_policy(given: WholeInput) -> dict[str, Any]:
    """Train on the files of the `datasets` stage, unless a policy of the run was trained on the same rows already.

    Raises:
        BadInput: the data, the settings or the cluster cannot give a training run.
        StageStop: the run was to end (`--max-cost`), and the training ended at a checkpoint; or the trained model could
            not be written.
    """
    from ray_pipeline.graph.cluster import connected

    with connected(warm=True):  # where stages run without a cluster, Ray Train gets one of its own
        return _train_policy(given)


def _train_policy(given: WholeInput) -> dict[str, Any]:
    import ray

    settings: _Given = given.settings
    train, data = settings.train, given.inputs["datasets"]
    kind = method_of(train.method).data
    validation = data.facts.get("rows", {}).get(kind, {}).get("val", 0)
    resolved: dict[str, Any] = {}
    if train.use_gpu is None:
        resolved["use_gpu"] = bool(ray.cluster_resources().get("GPU"))
    if kind == "kto":
        weights = data.facts.get("kto_weights") or {}
        resolved |= {name: getattr(train, name) or weights.get(name, 1.0) for name in KTO_WEIGHTS}
    spec = _spec(settings, train.model_copy(update=resolved), data.folder, given.folder, given.fingerprint)
    content = _content(Folder(data.folder) / kind, method_of(train.method).columns, resolved)
    if counted := given.inputs.get("steps of"):
        spec = dataclasses.replace(spec, steps=spec.steps_for(counted.facts["rows"][kind]["train"]))
        # As many rows as the reference take its steps anyway: this is the training by epochs.
        if spec.packs or counted.facts["rows"][kind]["train"] != data.facts["rows"][kind]["train"]:
            content = digest([content, spec.steps])
    if start := given.inputs.get("start"):
        spec = dataclasses.replace(spec, adapter=join(start.folder, "adapter"))
        content = digest([content, model_identity(spec.adapter or "")["model"]])
    if same := find_same(given, content, settings.alike):
        return _take_over(given, content, *same)
    spec = dataclasses.replace(
        spec,
        val_files=join(data.folder, f"{kind}/val/*.parquet") if validation else None,
        card={
            "dataset": data.fingerprint,
            "kind of rows": kind,
            "training": given.fingerprint,
            **({"starts from": start.fingerprint} if start else {}),
        },
    )
    for name in (STOP, PROGRESS):  # of an earlier attempt
        given.folder.delete(name)
    given.phase("starting workers")
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(given, ended), daemon=True)
    teller.start()
    try:
        result = fit(spec, lambda warning: given.log(f"warning: {warning}"))
    except TrainingInputError as error:
        raise BadInput(str(error)) from error
    except (TrainingStopped, ModelNotWritten) as error:
        raise StageStop(str(error)) from error
    finally:
        ended.set()
        teller.join()
    metrics = result.metrics.select(TRAIN_METRICS.names).cast(TRAIN_METRICS)
    given.folder.write_table(METRICS, metrics, fingerprint=given.fingerprint, kind="train_metrics")
    record(given, content)
    return {
        "method": train.method,
        "learnt_from": content,
        "steps": result.steps,
        "epochs": result.epochs,
        "train_loss": result.train_loss,
        "effective": result.effective,
        "data": result.data,
        "resumed_from": result.resumed_from,
        "max_logit_diff": result.max_logit_diff,
        "train_seconds": result.train_seconds,
    }


def _content(rows: Folder, columns: Iterable[str], resolved: Mapping[str, Any]) -> str:
    """Digest of what a policy learns from: the columns of the rows, in order and by split, and settings that follow
    from them. Every file is verified on the way, which TRL's reader does in part."""
    whole = hashlib.blake2b(digest({k: v for k, v in resolved.items() if k in KTO_WEIGHTS}).encode(), digest_size=16)
    for split in rows.folders():
        whole.update(f"{split}\n".encode())
        for name in (rows / split).names(".parquet"):
            table = (rows / split).read_table(name)
            for batch in table.select([c for c in columns if c in table.column_names]).to_batches(1000):
                whole.update("".join(f"{digest(row)}\n" for row in batch.to_pylist()).encode())
    return whole.hexdigest()


def _take_over(given: WholeInput, content: str, source: Folder, result: Mapping[str, Any]) -> dict[str, Any]:
    """Use the policy that was trained on the same rows with the same settings."""
    name = os.path.basename(source.location)
    given.log(f"same training rows and settings as {name}: its policy is used (--from train trains a new one)")
    take_over(source, given.folder, ("adapter", "merged"))
    metrics = source.read_table(METRICS, fingerprint=result["fingerprint"], schema=TRAIN_METRICS)
    given.folder.write_table(METRICS, metrics, fingerprint=given.fingerprint, kind="train_metrics")
    record(given, content)
    return {**result["facts"], "learnt_from": content, "taken_from": name}


def _tell(given: WholeInput, ended: threading.Event) -> None:
    """Pass on what the workers write about their progress, and to them that the run is to end."""
    told = asked = None
    while not ended.wait(1.0):
        if asked is None and (reason := given.stopping()):
            with contextlib.suppress(NotWritten):  # then in a second
                given.folder.write_json(STOP, {"reason": reason})
                given.log(f"ends at its next checkpoint, unless that is the last: {reason}")
                asked = reason
        try:
            now = given.folder.read_json(PROGRESS)
        except (OSError, StoreError):
            continue
        if now != told:
            told = now
            given.phase(now["phase"])
            if now["steps"]:
                given.tick(now["step"], now["steps"], now["note"])
