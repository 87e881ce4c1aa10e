"""vLLM alone: the same calls through `AsyncLLM`, as a script without Quorum would make them.

The arguments are those that the model's user sets, and vLLM's defaults for batch work (the usage context of
`vllm.LLM`). Its CPU build has no such defaults; there Quorum's are taken, with its threads. All calls are handed over
at once, since vLLM queues them itself. Engine start and the first use of the grammar back end are left out.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ray_pipeline.engines.base import Grammar, Message, Sampling
from ray_pipeline.engines.core_server import is_cpu_build
from ray_pipeline.engines.usage import Usage
from ray_pipeline.engines.vllm_arguments import engine_args
from ray_pipeline.engines.vllm_processes import Reaper, child_environment, end_processes, prepare_environment
from ray_pipeline.engines.vllm_replies import sampling_params
from ray_pipeline.engines.vllm_spec import VllmSpec

Call = tuple[list[Message], Sampling]
Result = TypeVar("Result")


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own, so that it leaves nothing on the device."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def logged_calls(rows: Iterable[Mapping[str, Any]]) -> list[Call]:
    """The calls of rows of the call log, ordered by their messages, so that shared prefixes follow each other."""
    calls = []
    for row in sorted(rows, key=lambda row: [message["content"] for message in row["messages"]]):
        values = json.loads(row["sampling"])
        grammar = values["grammar"]
        values |= {
            "stop": tuple(values["stop"]),
            "grammar": None if grammar is None else Grammar(*grammar),
            "extra": tuple((name, value) for name, value in values["extra"]),
        }
        calls.append((list(row["messages"]), Sampling(**values)))
    return calls


def bare_loop(spec: VllmSpec, calls: Sequence[Call]) -> Usage:
    """Make the calls; `wall_seconds` is the time from the first to the last. Run it in a process of its own."""
    return asyncio.run(_loop(spec, calls))


async def _loop(spec: VllmSpec, calls: Sequence[Call]) -> Usage:
    prepare_environment()
    cpu, owner = is_cpu_build(), Reaper()
    with child_environment(owner, cpu=cpu):
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_args(spec, None, cpu=True) if cpu else {}
        arguments |= {"model": spec.model, "dtype": spec.dtype, "disable_log_stats": True, **spec.args}
        if spec.max_model_len is not None:
            arguments["max_model_len"] = spec.max_model_len
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)

    async def make(name: str, messages: list[Message], sampling: Sampling) -> Usage:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **spec.chat_template_args
        )
        prompt, last = tokenizer.encode(text, add_special_tokens=False), None
        async for output in engine.generate(
            {"type": "token", "prompt_token_ids": prompt}, sampling_params(sampling), name
        ):
            last = output
        assert last is not None
        return Usage(
            calls_engine=1,
            prompt_tokens=len(prompt),
            cached_tokens=last.num_cached_tokens or 0,
            completion_tokens=len(last.outputs[0].token_ids),
        )

    try:
        await make("first", [{"role": "user", "content": "Hello"}], calls[0][1])
        begin = time.monotonic()
        made = await asyncio.gather(*(make(str(number), *call) for number, call in enumerate(calls)))
        return sum(made, Usage(wall_seconds=time.monotonic() - begin))
    finally:
        end_processes(engine, owner, None)
