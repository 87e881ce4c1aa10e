"""Who a model is: the part of a call key that says which weights answered.

A path names a place, not a model: a policy retrained into the same folder is another model, and the
same weights copied elsewhere are the same one. So local folders are named by the digest of what they
hold, and hub models by the commit that their name resolves to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_pipeline.store.files import StoreError
from ray_pipeline.store.local import local_copy

#: Files that decide what a model answers, besides its weights.
_DESCRIBING = (
    r"config\.json|generation_config\.json|adapter_config\.json|quant\w*_config\.json|hf_quant_config\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|tekken\.json|spiece\.model|sentencepiece\.bpe\.model"
    r"|chat_template\.(jinja|json)|.*\.tiktoken|.*\.py"
)
_SAFETENSORS = r".*\.safetensors(\.index\.json)?"
#: Older weight formats are read only where there is no safetensors file. `optimizer.bin`, `training_args.bin` and
#: their like lie beside the weights of a training run and answer nothing.
_OTHER_WEIGHTS = r"(pytorch_model|adapter_model|model|consolidated)[\w.-]*\.(bin|pt|pth)(\.index\.json)?|.*\.gguf"

#: Keys of `config.json` and `adapter_config.json` that say where a model came from and not what it is.
_WHERE = frozenset({"_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"})

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 22  # bytes read at once
_HUB_TIMEOUT = 15.0  # seconds

_digests: dict[tuple[str, int, int], str] = {}


class ModelNotFound(ValueError):
    """A model or adapter is neither a folder here nor known to the hub. The message names the remedy."""


def model_identity(model: str, revision: str | None = None, adapter: str | None = None) -> dict[str, str]:
    """What identifies a model, with its LoRA adapter when there is one.

    Args:
        model: folder (or GGUF file) on this machine, URI of a folder, or the name of a hub model.
        revision: branch, tag or commit of a hub model; a folder has none, and it is ignored there.
        adapter: folder or hub name of a LoRA adapter.

    Returns:
        ``{"model": ID}`` or ``{"model": ID, "adapter": ID}``, with ID ``"sha256:<digest>"`` for local files
        and ``"hub:<name>@<commit>"`` for hub models. Digests of weights are computed once per process, file size
        and time of change; hashing takes about a second per GB.

    Raises:
        ModelNotFound: nothing of that name here or on the hub.
    """
    identity = {"model": _identify(model, revision, "model")}
    if adapter is not None:
        identity["adapter"] = _identify(adapter, None, "adapter")
    return identity


def text_digest(text: str) -> str:
    """``sha256:<digest>`` of a text, in the form of a model digest."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _identify(name: str, revision: str | None, what: str) -> str:
    try:
        path = Path(local_copy(name)).expanduser()
    except (FileNotFoundError, StoreError) as error:
        raise ModelNotFound(f"{what} {name!r}: {error}") from error
    if path.exists():
        return "sha256:" + folder_digest(path)
    if name.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(
            f"{what} {name!r}: there is no such folder (looked for {path.absolute()}); "
            "correct the path, or make the folder visible on this node too (shared storage), or name a hub model"
        )
    commit = hub_commit(name, revision)
    return f"hub:{name}@{commit}"


def folder_digest(path: Path) -> str:
    """Hex SHA-256 over the files of a model folder that decide its answers, by name and content.

    Raises:
        ModelNotFound: the folder holds no file of a model.
    """
    files = [path] if path.is_file() else _deciding_files(path)
    if not files:
        raise ModelNotFound(
            f"folder {path.absolute()} holds no model: no config, weights or tokenizer in it; "
            "name the folder that has config.json (an adapter: adapter_config.json)"
        )
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets go of the GIL
        digests = list(pool.map(_file_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        # The name of a single file is where it lies; inside a folder names are part of the format.
        whole.update(f"{'' if path.is_file() else file.name}\0{digest}\n".encode())
    return whole.hexdigest()


def _deciding_files(folder: Path) -> list[Path]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    wanted = [name for name in names if re.fullmatch(f"{_DESCRIBING}|{_SAFETENSORS}", name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        wanted += [name for name in names if re.fullmatch(_OTHER_WEIGHTS, name) and name not in wanted]
    return [folder / name for name in sorted(wanted)]


def _file_digest(file: Path) -> str:
    stat = file.stat()
    key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    known = _digests.get(key)
    if known is None:
        known = _digests[key] = _read_digest(file)
    return known


def _read_digest(file: Path) -> str:
    if file.name in ("config.json", "adapter_config.json"):
        try:
            config = json.loads(file.read_bytes())
            kept = {key: value for key, value in config.items() if key not in _WHERE}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        except (ValueError, AttributeError):
            pass  # not a JSON object: its bytes will do
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hub_commit(name: str, revision: str | None = None) -> str:
    """The commit that a hub model's revision (default ``main``) points to now.

    Asks the hub, and falls back on this machine's hub cache when the hub is switched off (``HF_HUB_OFFLINE=1``) or
    out of reach.

    Raises:
        ModelNotFound: neither knows it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted = revision or "main"
    tried: list[str] = []
    if constants.HF_HUB_OFFLINE:
        tried.append("the hub was not asked because HF_HUB_OFFLINE is set")
    else:
        try:
            commit = HfApi().model_info(name, revision=wanted, timeout=_HUB_TIMEOUT).sha
            if commit:
                return str(commit)
            tried.append("the hub named no commit")
        except RevisionNotFoundError:
            raise ModelNotFound(
                f"hub model {name!r} has no revision {wanted!r}; name a branch, a tag or a commit that it has"
            ) from None
        except RepositoryNotFoundError:
            tried.append("the hub knows no such model, or it is private or gated (then log in: HF_TOKEN)")
        except Exception as error:  # network and HTTP errors of several libraries: whatever it is, the cache may know
            tried.append(f"the hub did not answer ({type(error).__name__}: {str(error)[:200]})")

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + name.replace("/", "--"))
    if _COMMIT.fullmatch(wanted) and (folder / "snapshots" / wanted).is_dir():
        return wanted
    reference = folder / "refs" / wanted
    if reference.is_file():
        return reference.read_text().strip()
    tried.append(f"the hub cache has no revision {wanted!r} of it ({folder})")
    raise ModelNotFound(
        f"model {name!r} was not found: no folder {os.path.abspath(name)}; {'; '.join(tried)}. "
        "Correct the name, give the absolute path of a folder, or download it while online (hf download "
        f"{name}) into an HF_HOME that every node can read"
    )
