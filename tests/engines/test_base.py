"""Values of the engine protocol: keys, grammars, errors that travel."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from ray_pipeline.engines.base import EngineDead, EngineError, Grammar, PromptTooLong, Sampling


def test_equal_samplings_have_equal_keys_and_every_field_counts() -> None:
    assert Sampling(temperature=1, top_p=1).key() == Sampling(temperature=1.0).key()
    assert Sampling(extra=(("top_k", 5), ("min_p", 0.1))).key() == Sampling(extra=(("min_p", 0.1), ("top_k", 5))).key()
    changed = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_p=0.9),
        Sampling(max_tokens=3),
        Sampling(seed=0),
        Sampling(stop=("\n",)),
        Sampling(logprobs=5),
        Sampling(grammar=Grammar.choice(["1", "2"])),
        Sampling(grammar=Grammar.regex("1|2")),
        Sampling(extra=(("top_k", 5),)),
    ]
    texts = {json.dumps(sampling.key()) for sampling in changed}
    assert len(texts) == len(changed)


def test_a_schema_keeps_the_order_of_its_keys() -> None:
    reason_first = Grammar.json({"properties": {"reason": {}, "score": {}}})
    score_first = Grammar.json({"properties": {"score": {}, "reason": {}}})
    assert reason_first != score_first
    assert list(reason_first.decoded()["properties"]) == ["reason", "score"]
    assert Grammar.choice(["a", "b"]).decoded() == ["a", "b"]
    assert Grammar.regex("[0-9]").decoded() == "[0-9]"


@pytest.mark.parametrize("wrong", [[], "ab", [""], [1]])
def test_a_choice_needs_strings(wrong: object) -> None:
    with pytest.raises(ValueError, match="non-empty strings"):
        Grammar.choice(wrong)  # type: ignore[arg-type]


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PromptTooLong(90, 20, 100)))
    assert (error.prompt_tokens, error.max_tokens, error.limit) == (90, 20, 100)
    assert isinstance(error, EngineError)
    assert not issubclass(EngineDead, EngineError)


def test_neither_protocol_nor_specification_imports_anything_heavy() -> None:
    code = (
        "import sys; import ray_pipeline.engines.base, ray_pipeline.engines.vllm, ray_pipeline.engines.vllm_spec as v; "
        "v.validate_engine_args({'max_num_seqs': 1}); v.validate_sampling_extra({'top_k': 1}); "
        "print([m for m in ('torch', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
