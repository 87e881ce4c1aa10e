"""Identity of a model: the part of a call key that depends on the weights.

A path does not identify a model: a policy retrained into the same folder is another model, and the
same weights copied elsewhere are the same one. So local folders are identified by a digest of their
content, and Hub models by the commit that their name resolves to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.local import local_copy

#: Files that affect a model's replies, besides its weights.
_DESCRIBING = (
    r"config\.json|generation_config\.json|adapter_config\.json|quant\w*_config\.json|hf_quant_config\.json"
    r"|tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|tekken\.json|spiece\.model|sentencepiece\.bpe\.model"
    r"|chat_template\.(jinja|json)|.*\.tiktoken|.*\.py"
)
_SAFETENSORS = r".*\.safetensors(\.index\.json)?"
#: Older weight formats count only without a safetensors file. `optimizer.bin`, `training_args.bin` and the like are
#: by-products of training and do not affect replies.
_OTHER_WEIGHTS = r"(pytorch_model|adapter_model|model|consolidated)[\w.-]*\.(bin|pt|pth)(\.index\.json)?|.*\.gguf"

#: Keys of `config.json` and `adapter_config.json` about a model's origin, which does not affect it.
_WHERE = frozenset({"_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"})

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 22  # bytes read at once
_HUB_TIMEOUT = 15.0  # seconds

_digests: dict[tuple[str, int, int], str] = {}


class ModelNotFound(ValueError):
    """A model or adapter is neither a local folder nor on the Hub. The message names the fix."""


def model_identity(model: str, revision: str | None = None, adapter: str | None = None) -> dict[str, str]:
    """The identity of a model, and of its LoRA adapter if it has one.

    Args:
        model: local folder (or GGUF file), URI of a folder, or name of a Hub model.
        revision: branch, tag or commit of a Hub model; ignored for a folder.
        adapter: folder or Hub name of a LoRA adapter.

    Returns:
        ``{"model": ID}`` or ``{"model": ID, "adapter": ID}``, with ID ``"sha256:<digest>"`` for local files
        and ``"hub:<name>@<commit>"`` for Hub models. Digests of weights are computed once per process, file size
        and modification time; hashing takes about a second per GB.

    Raises:
        ModelNotFound: no such local folder and no such Hub model.
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
            f"{what} {name!r}: no such folder (looked for {path.absolute()}); fix the path, make the folder available "
            "on this node (shared storage), or use the name of a Hub model"
        )
    commit = hub_commit(name, revision)
    return f"hub:{name}@{commit}"


def folder_digest(path: Path) -> str:
    """Hex SHA-256 over the files of a model folder that affect its replies, by name and content.

    Raises:
        ModelNotFound: the folder contains no model file.
    """
    files = [path] if path.is_file() else _deciding_files(path)
    if not files:
        raise ModelNotFound(
            f"folder {path.absolute()} contains no model (no config, weights or tokenizer); "
            "use the folder with config.json (for an adapter: adapter_config.json)"
        )
    digests = [_digests.get(_key(file)) for file in files]
    if None in digests:
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
            digests = list(pool.map(_file_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        # The name of a single file is only its location; inside a folder names are part of the format.
        whole.update(f"{'' if path.is_file() else file.name}\0{digest}\n".encode())
    return whole.hexdigest()


def _deciding_files(folder: Path) -> list[Path]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    wanted = [name for name in names if re.fullmatch(f"{_DESCRIBING}|{_SAFETENSORS}", name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        wanted += [name for name in names if re.fullmatch(_OTHER_WEIGHTS, name) and name not in wanted]
    return [folder / name for name in sorted(wanted)]


def _key(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def _file_digest(file: Path) -> str:
    key = _key(file)
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
            pass  # not a JSON object: its bytes are hashed
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
