"""Quick checks of settings and cluster (seconds) before workers start (minutes)."""

from __future__ import annotations

import importlib.util
import netrc
import os
import urllib.parse

import pyarrow as pa

from ray_pipeline.config.messages import installing, nearest
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.store.node_labels import may_run
from ray_pipeline.training.methods import TrainingInputError, method_of
from ray_pipeline.training.spec import TrainSettings, TrainSpec

#: Values of `report_to` that are extras of the same name.
LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow")


def check_spec(spec: TrainSpec) -> None:
    """Check what `TrainSettings` cannot: paths, names, packages and options that depend on each other. Reads no file.

    Raises:
        TrainingInputError: an invalid setting; the message names it and the fix.
    """
    method = method_of(spec.settings.method)
    for name in ("train_files", "val_files", "output_dir", "storage_path"):
        path = getattr(spec, name)
        if path is not None and not os.path.isabs(path) and "://" not in path:
            raise TrainingInputError(
                f"{name} must be an absolute path or a URI, not {path!r}: training workers have other working folders"
            )
    if "://" in spec.model:
        raise TrainingInputError(f"model must be a folder or a Hub name, not {spec.model!r}; copy it to a folder")
    if not os.path.isabs(spec.model) and spec.model.startswith((".", "~")):
        raise TrainingInputError(f"model must be an absolute path or a Hub name, not {spec.model!r}")
    if os.path.isabs(spec.model) and not os.path.isdir(spec.model):
        raise TrainingInputError(f"model: no folder {spec.model}; fix the path or use a Hub name")
    if not spec.run_name or "/" in spec.run_name or spec.run_name.startswith("."):
        raise TrainingInputError(f"run_name must be a plain file name, not {spec.run_name!r}")
    try:  # TRL reads them from a column of the rows. Its ORPO and CPO trainers pass their own `tools` to the template.
        kept = pa.array([spec.chat_template_args]).to_pylist() == [spec.chat_template_args]
    except pa.ArrowException:
        kept = False
    if not kept or (method.adds_ends and "tools" in spec.chat_template_args):
        raise TrainingInputError(
            f"chat_template_args: {spec.settings.method} cannot be trained with {spec.chat_template_args!r}; use plain "
            "values and lists of one type"
        )
    if spec.max_length < 2:
        raise TrainingInputError(f"max_length must be at least 2, not {spec.max_length}")
    _check_names(spec.settings)
    _check_options(spec.settings)


def check_model(spec: TrainSpec) -> None:
    """Check that the trainer can be built on the base: see `build_check`. Takes seconds, for the imports.

    Raises:
        TrainingInputError: what a worker would raise.
    """
    with heavy_imports():
        from ray_pipeline.training.build_check import check_build

    check_build(spec)


def _check_names(train: TrainSettings) -> None:
    with heavy_imports():
        from transformers import SchedulerType
        from transformers.integrations.integration_utils import (
            INTEGRATION_TO_CALLBACK,
            get_available_reporting_integrations,
        )

    schedulers = [str(item.value) for item in SchedulerType]
    if train.lr_scheduler not in schedulers:
        raise TrainingInputError(f"lr_scheduler must be one of {', '.join(schedulers)}, not {train.lr_scheduler!r}")
    installed = get_available_reporting_integrations()
    for name in train.report_to:
        if name not in installed:
            if name in LOGGERS:
                raise TrainingInputError(f"report_to: {name} is not installed; run: {installing(name)}")
            raise TrainingInputError(
                f"report_to: {name!r} is not installed or unknown (installed: {', '.join(installed) or 'none'})"
                f"{nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
    if "wandb" in train.report_to and not _knows_wandb():
        raise TrainingInputError(
            "report_to: wandb has no API key, so every worker would fail at its start; set WANDB_API_KEY, run `wandb "
            "login`, or set WANDB_MODE=offline to keep its files in the run"
        )


def _knows_wandb() -> bool:
    """Whether Weights & Biases would start here: with a key of the environment or of `wandb login`, or offline."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    server = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _check_options(train: TrainSettings) -> None:
    """Check the options that need a package, a device or each other."""
    if train.quantization is not None:
        if train.shard != "none":
            raise TrainingInputError(f"quantization together with shard={train.shard} is not supported; choose one")
        if not train.use_gpu:
            raise TrainingInputError("quantization needs workers with a GPU (use_gpu)")
        _need("bitsandbytes", "quantization", "qlora")
    if train.shard != "none" and train.num_workers < 2:
        raise TrainingInputError(f"shard={train.shard} has no effect with num_workers=1; add workers or set shard=none")
    if train.shard in ("zero2", "zero3"):
        if not train.use_gpu:
            raise TrainingInputError(
                f"shard={train.shard} needs workers with a GPU (use_gpu): Accelerate ignores DeepSpeed on CPUs"
            )
        _need("deepspeed", f"shard={train.shard}", "deepspeed")
    for name, shards in {"fsdp_config": ("fsdp",), "deepspeed": ("zero2", "zero3")}.items():
        if name in train.trainer_args and train.shard not in shards:
            raise TrainingInputError(f"trainer_args.{name} needs shard={' or '.join(shards)}; set that too")
    if train.trainer_args.get("use_liger_kernel"):
        _need("liger_kernel", "trainer_args.use_liger_kernel", "liger")


def _need(package: str, setting: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TrainingInputError(f"{setting} needs {package}; run: {installing(extra)}")


def check_cluster(spec: TrainSpec) -> None:
    """Refuse a run that the cluster can never place, for which Ray Train would wait silently.

    Raises:
        TrainingInputError: too few CPUs or GPUs in total, or on each node for one worker.
    """
    import ray

    need = spec.worker_resources
    if spec.settings.autoscaling:
        return
    nodes = [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and may_run(spec.settings.label_selector, node.get("Labels") or {})
    ]
    places = sum(int(min(node.get(name, 0.0) / amount for name, amount in need.items())) for node in nodes)
    if places < spec.settings.num_workers:
        total = ray.cluster_resources()
        each = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
        have = ", ".join(f"{total.get(name, 0.0):g} {name}" for name in need)
        raise TrainingInputError(
            f"num_workers={spec.settings.num_workers} workers of {each} each do not fit the cluster, which has "
            f"{have} on {len(nodes)} usable node(s): room for {places}; lower num_workers or cpus_per_worker, add "
            "nodes, or set autoscaling if the cluster grows on demand"
        )
