"""Sampling and pooling parameters in vLLM's form, and completions from its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import CallFailed, Completion, EngineError, Sampling, TokenLogprobs, causes, rejected
from ray_pipeline.engines.vllm_spec import sampling_problem


def sampling_params(sampling: Sampling, end_token: int | None = None) -> Any:
    """vLLM's form of a ``Sampling``. Raises EngineError for values that vLLM rejects.

    Args:
        end_token: id of the token that ends a reply under the chat template. It ends one as EOS does: unless the
            sampling ignores EOS, and beside the sampling's own stop tokens.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    extra = dict(sampling.extra)
    for name in extra:
        problem = sampling_problem(name, frozenset(SamplingParams.__struct_fields__))
        if problem:
            raise rejected(problem)
    if end_token is not None and not extra.get("ignore_eos"):
        extra["stop_token_ids"] = [*(extra.get("stop_token_ids") or ()), end_token]
    grammar = sampling.grammar
    structured: dict[str, Any] = {}
    if grammar is not None:
        # A schema is passed as text: fields are generated in the order of its keys.
        structured[grammar.kind] = grammar.decoded() if grammar.kind == "choice" else grammar.value
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            logprobs=sampling.logprobs,
            structured_outputs=None if grammar is None else StructuredOutputsParams(**structured),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # these parameters are not shared with another request
            **extra,
        )
    except Exception as error:
        raise rejected(f"vLLM rejected the sampling parameters: {causes(error)}") from error


def read_completion(output: Any, prompt_tokens: int, latency_s: float, inside: bool = False) -> Completion:
    """The completion in the last output of a request (``vllm.RequestOutput``). Raises CallFailed if there is none.

    Args:
        inside: as of a ``Completion``.
    """
    if output is None or not output.outputs:
        raise CallFailed("vLLM ended the request without a reply")
    reply = output.outputs[0]
    return Completion(
        text=reply.text,
        finish_reason=str(reply.finish_reason),
        prompt_tokens=prompt_tokens,
        completion_tokens=len(reply.token_ids),
        cached_tokens=int(output.num_cached_tokens or 0),
        logprobs=None if reply.logprobs is None else _token_logprobs(reply.token_ids, reply.logprobs),
        latency_s=latency_s,
        inside=inside,
    )


def pooling_params() -> Any:
    """What a reward model is asked for: its score, which is the logit itself."""
    from vllm.pooling_params import PoolingParams

    return PoolingParams(task="classify", use_activation=False)


def read_reward(output: Any, prompt_tokens: int, latency_s: float) -> Completion:
    """The score in the last output of a request (``vllm.PoolingRequestOutput``), as the text of a completion: six
    significant digits, since the seventh of a float32 depends on the other calls of a batch.

    Raises:
        CallFailed: there is none.
        EngineError: the model has several outputs, or one that is not finite.
    """
    if output is None:
        raise CallFailed("vLLM ended the request without a score")
    scores = output.outputs.data.float().reshape(-1).tolist()
    if len(scores) != 1:
        raise rejected(f"a reward model has one output, this model has {len(scores)} (num_labels in its config.json)")
    if not math.isfinite(scores[0]):
        raise EngineError(f"the score is {scores[0]}")
    return Completion(f"{scores[0]:.6g}", "stop", prompt_tokens, 0, int(output.num_cached_tokens or 0), None, latency_s)


def _token_logprobs(token_ids: Sequence[int], steps: Sequence[Mapping[int, Any]]) -> TokenLogprobs:
    """Per generated token its alternatives, the sampled one first, the others by descending probability."""
    tokens: TokenLogprobs = []
    for token, step in zip(token_ids, steps, strict=False):
        others = sorted((entry for key, entry in step.items() if key != token), key=lambda entry: -entry.logprob)
        chosen = [step[token]] if token in step else []
        tokens.append([(entry.decoded_token or "", float(entry.logprob)) for entry in [*chosen, *others]])
    return tokens
