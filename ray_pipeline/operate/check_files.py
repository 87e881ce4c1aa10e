"""Checks of files, folders, local models and disk space before a run."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.graph.stage import Stage
from ray_pipeline.operate.estimate import Estimate
from ray_pipeline.operate.pending import Finding, Pending, names
from ray_pipeline.store.files import Folder
from ray_pipeline.training.spec import POLICIES

#: Weights with two dimensions that "all-linear" leaves out.
_NOT_ADAPTED = re.compile(r"embed|lm_head|wte|wpe")
_HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Taken for the mean length of a reply.
_REPLY_TOKENS = 256


def folders(pending: Pending) -> Iterator[Finding]:
    """Run folder and call log can be written to."""
    places = {"run folder": pending.session.folder, "call log": pending.session.calls_root}
    for what, location in places.items():
        folder, what = Folder(location), f"{what} {location}"
        if folder.is_local:
            there = _existing(location)
            if os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK):
                yield Finding(what, "ok", "can be written to")
            else:
                yield Finding(what, "problem", f"{there} cannot be written to; fix its permissions, or set another")
        elif pending.scope != "all":
            yield Finding(what, "not checked", "needs the network")
        else:
            probe = f"_check-{os.getpid()}"
            try:
                folder.write_bytes(probe, b"")
                folder.delete(probe)
                yield Finding(what, "ok", "can be written to")
            except OSError as error:
                yield Finding(what, "problem", f"{error}; check address, credentials and permissions")


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def inputs(pending: Pending) -> Iterator[Finding]:
    """Files and datasets that the user gave are there, have the columns that the configuration names, and hold rows."""
    for stage in pending.roots:
        what = f"rows of {stage.name}"
        if pending.scope == "light":
            yield Finding(what, "not checked", "takes as long as reading them; run `quorum check`")
            continue
        if pending.scope != "all" and any(_HUB_COMMIT.fullmatch(value) for value in stage.external.values()):
            yield Finding(what, "not checked", "needs the network: a dataset of the Hugging Face Hub")
            continue
        try:
            pending.stand_ins.make(stage)
        except (ValueError, FileNotFoundError) as error:
            yield Finding(what, "problem", str(error))
            continue
        yield Finding(what, "ok", f"{pending.stand_ins.prompts(stage):,.0f} can be read")


def models(pending: Pending) -> Iterator[Finding]:
    """Files of local models can be read. Their engines are not started here (see `canary.engines`)."""
    for key, (model, stages) in pending.models.items():
        if not model.is_here:
            continue
        what = f"{key} ({model.shown}, for {names(stages)})"
        if problem := _unusable(model.spec()):
            yield Finding(what, "problem", problem)
        else:
            read = "files can be read" if os.path.isdir(model.model) else "found on the Hub, downloaded when it starts"
            yield Finding(what, "ok", f"{read}; whether it answers is checked when its engine starts")


def _unusable(spec: VllmSpec) -> str:
    """Why a local model folder cannot be loaded, as far as its file names tell."""
    if not os.path.isdir(spec.model):
        return ""
    names = sorted(os.listdir(spec.model))
    closed = [name for name in names if not os.access(os.path.join(spec.model, name), os.R_OK)]
    if closed:
        return f"{os.path.join(spec.model, closed[0])} cannot be read; fix its permissions"
    for what, pattern in (
        ("config", r"config\.json|params\.json|.*\.gguf"),
        ("weights", r".*\.(safetensors|bin|pt|pth|gguf)"),
        ("tokenizer", r"tokenizer.*|vocab\..*|tekken\.json|.*\.(model|tiktoken|gguf)"),
    ):
        place = spec.args.get("tokenizer") if what == "tokenizer" else None
        if place is None and not any(re.fullmatch(pattern, name) for name in names):
            return f"{spec.model} has no {what} file; copy the whole model there"
    return ""


def disk(pending: Pending) -> Iterator[Finding]:
    """Space for what will be written: texts by the calls to come, weights by the size of the base model."""
    weights, unknown = 0.0, []
    for stage in pending.todo:
        if stage.role_name in POLICIES:
            size = written_weights(stage)
            weights += size or 0
            unknown += [] if size else [stage.name]
    texts = 0 if pending.tried else sum(map(_text, pending.stand_ins.estimates.values()))
    needs: dict[int, tuple[str, float, float]] = {}  # by device: a folder, bytes of weights, bytes of text
    for location, large in ((pending.session.folder, weights), (pending.session.calls_root, 0)):
        if pending.todo and Folder(location).is_local:
            place = _existing(location)
            known = needs.get(device := os.stat(place).st_dev, (place, 0, 0))
            needs[device] = known[0], known[1] + large, known[2] + texts
    for place, heavy, small in needs.values():
        free = shutil.disk_usage(place).free
        parts = [f"about {bytes_text(heavy)} of weights"] if heavy else []
        parts += [f"weights of {', '.join(unknown)} (size unknown)"] if unknown else []
        parts += [f"up to {bytes_text(small)} of text"] if small else []
        what, figures = (
            f"disk space at {place}",
            f"{bytes_text(free)} free; to be written: {', '.join(parts) or 'text'}",
        )
        if free < heavy or free < small / 100:
            yield Finding(what, "problem", f"{figures}; free some space there, or choose another run folder")
        else:
            yield Finding(what, "warning" if free < heavy + small else "ok", figures)


def _text(stage: Estimate) -> float:
    """Bytes of the prompts and replies of a stage in one copy: four a token, and no compression."""
    return 4 * (stage.prompt_tokens + _REPLY_TOKENS * stage.calls)


def written_weights(training: Stage) -> float | None:
    """Bytes of the weights that a training stage will write (`train.save`), without its checkpoints; None where the
    base is not here."""
    settings, base = training.work.settings.train, Path(training.work.settings.model.model)
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    if not files:
        return None
    shapes = [shape for file in files for shape in _shapes(file).items()]
    merged: float = sum(math.prod(shape) for _, shape in shapes) * {"float32": 4, "bfloat16": 2}[settings.dtype]
    if settings.lora is None or settings.save == "merged":
        return merged
    # A LoRA adapter of rank r has r float32 weights for each input and output of a linear layer.
    sides = sum(sum(shape) for name, shape in shapes if len(shape) == 2 and not _NOT_ADAPTED.search(name))
    adapter: float = 4 * settings.lora.r * sides
    return adapter + (merged if settings.save == "both" else 0)


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, "numpy") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def bytes_text(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
