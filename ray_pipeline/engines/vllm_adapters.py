"""LoRA adapters on a vLLM engine: the memory reserved for them, and loading each before its first call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.engines.base import EngineDead, EngineStartError, causes
from ray_pipeline.engines.identity import model_identity
from ray_pipeline.store.local import local_copy

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes for which vLLM reserves memory
#: Adapters in one batch. Each takes memory of the GPU, and stages that share an engine follow each other.
_AT_ONCE = 4


class LoadedAdapters:
    """The adapters that the core of one engine has loaded, as vLLM needs them with every call."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}  # vllm.lora.request.LoRARequest
        self._loading = asyncio.Lock()

    async def load(self, engine: Any, adapter: str | None) -> Any:
        """vLLM's `LoRARequest` of an adapter, loaded if it is not; None for no adapter.

        Args:
            engine: the `AsyncLLM`, the same every time; None if it was closed.

        Raises:
            EngineDead: the engine ended.
            EngineStartError: the adapter cannot be loaded.
        """
        if adapter is None:
            return None
        if adapter not in self._loaded:
            async with self._loading:
                if adapter not in self._loaded:
                    self._loaded[adapter] = await self._load(engine, adapter)
        return self._loaded[adapter]

    async def _load(self, engine: Any, adapter: str) -> Any:
        from vllm.lora.request import LoRARequest

        try:
            folder = await asyncio.to_thread(local_adapter, adapter)
            # vLLM caches the prefixes of prompts under an adapter's name, so its name is its content.
            name = (await asyncio.to_thread(model_identity, folder))["model"]
            same = next((lora for lora in self._loaded.values() if lora.lora_name == name), None)
            lora = same or LoRARequest(name, len(self._loaded) + 1, folder)
            await engine.add_lora(lora)
        except Exception as error:
            if engine is None or engine.errored:
                raise EngineDead(f"the engine ended before adapter {adapter!r} was loaded; see its log") from error
            raise EngineStartError(f"cannot load adapter {adapter!r}: {causes(error)}") from error
        return lora


def shared_room(adapters: Sequence[str]) -> dict[str, Any]:
    """Engine arguments with room for several adapters. One that cannot be read takes none: only calls that choose it
    fail."""
    ranks = [_RANKS[0]]
    for adapter in adapters:
        try:
            ranks.append(lora_rank(local_adapter(adapter)))
        except Exception:  # nothing there, no adapter, or none that vLLM can serve: raised again when it is loaded
            continue
    return {
        "enable_lora": True,
        "max_loras": min(len(adapters), _AT_ONCE),
        "max_cpu_loras": len(adapters),
        "max_lora_rank": max(ranks),
    }


def local_adapter(adapter: str) -> str:
    """A folder with the adapter's files; a Hub adapter is downloaded, unless it is in the Hub's cache."""
    adapter = local_copy(adapter)
    if Path(adapter).expanduser().exists():
        return str(Path(adapter).expanduser())
    from huggingface_hub import snapshot_download

    return str(snapshot_download(adapter))


def lora_rank(adapter: str) -> int:
    """The rank that vLLM must reserve for an adapter: the smallest of its sizes that is enough.

    Raises:
        EngineStartError: the folder contains no LoRA adapter, or its rank exceeds vLLM's maximum.
    """
    path = Path(adapter) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError) as error:
        raise EngineStartError(f"{path} is not the config of a LoRA adapter ({causes(error)})") from error
    for size in _RANKS:
        if rank <= size:
            return size
    raise EngineStartError(
        f"adapter {adapter!r} has rank {rank}, and vLLM serves at most {_RANKS[-1]}: merge it into its model"
    )
