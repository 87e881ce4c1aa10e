"""What one GPU gives: candidates, judged candidates, tokens and training through the pipeline, beside vLLM and TRL
alone, a roofline, and the figures to reach.

    python perf/gpu.py [--parts serving training] [--shape published] [--executor ray]
    python perf/gpu.py --shape tiny --executor inprocess        # the same on a CPU, with models of no size

The models have the shapes of Mistral-7B (policy) and Qwen3-8B (judges and critic) and random weights, so that nothing
is downloaded; their tokenizer is Mistral's Tekken, from the package mistral-common, cut to the size of the vocabulary.
Random weights never end a reply: every response has `new_tokens` tokens, and a verdict, under its grammar, is cut at
`reply_tokens` and stays unread; its cost counts here, not its content. The pipeline is configs/dmapo.yaml from prompts
to gate, with 256 prompts; the same calls of judges and critic then go to `AsyncLLM` alone (`perf/bare.py`), and the
same rows to a plain TRL script (`perf/train_overhead.py`). Starts of engines and workers are left out on all sides.

The roofline is the least time that a device can take, by its FLOP/s (matrix product) and bytes/s (copy), both measured
here. P are the parameters that are multiplied (all but the input embedding), B the sequences of a batch:

    serving   max(2·P·computed / FLOP/s,
                  (generated/B · bytes of P + generated · context · bytes of a token's KV cache) / bytes/s)
    training  2·P·tokens · 6 / FLOP/s     (KTO: forward, recomputed, backward, KL, reference, KL of the reference)

with computed = prompt tokens that were not cached + generated, and context = prompt + half of the reply. FLOPs of
attention are left out, so that the bound is a little too good.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from dags.dmapo import dmapo
from perf.bare import bare_loop, in_own_process, logged_calls
from perf.train_overhead import Task, run, write_data
from ray_pipeline.config.loading import load_config
from ray_pipeline.engines.usage import Usage
from ray_pipeline.engines.vllm_arguments import max_sequences
from ray_pipeline.graph.driver import execute
from ray_pipeline.operate.run_settings import EXECUTORS, executor_of, run_settings
from ray_pipeline.store.calls import identities, model_folder, read_part
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.dmapo_config import DmapoConfig

ROOT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
MAX_LENGTH = 1024  # of a training row, in tokens
FORWARD_PASSES = 6  # that a token of a KTO row costs, see above


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of models and workload.

    Attributes:
        policy, judge: of `MistralConfig` and `Qwen3Config`.
        words: of an instruction, and of each side of a training row.
        new_tokens, reply_tokens: of a response, and of a reply of a judge or the critic.
        args: of vLLM, beside dummy weights.
        rows, batch: of the training, and of an optimiser step.
    """

    policy: dict[str, Any]
    judge: dict[str, Any]
    dtype: str
    prompts: int
    shards: int
    words: int
    new_tokens: int
    reply_tokens: int
    rows: int
    batch: int
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096}
_TINY = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096,
}  # fmt: skip
SHAPES = {
    "published": Shape(
        {**_HEADS, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000, "sliding_window": None},
        {**_HEADS, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
        "bfloat16", prompts=256, shards=16, words=120, new_tokens=256, reply_tokens=96,
        rows=320, batch=16,
    ),
    "tiny": Shape(
        {**_TINY, "sliding_window": None}, _TINY,
        "float32", prompts=4, shards=2, words=20, new_tokens=16, reply_tokens=16,
        rows=16, batch=4, args={"max_num_seqs": 32},
    ),
}  # fmt: skip


def model_config(shape: Shape, role: str) -> Any:
    from transformers import MistralConfig, Qwen3Config

    values = {"tie_word_embeddings": False, "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2}
    if role == "policy":
        return MistralConfig(**shape.policy, **values, architectures=["MistralForCausalLM"])
    return Qwen3Config(**shape.judge, **values, architectures=["Qwen3ForCausalLM"])


def write_model(shape: Shape, role: str, folder: Path) -> None:
    """Configuration and tokenizer; vLLM makes the weights itself (`load_format: dummy`)."""
    import mistral_common
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    config = model_config(shape, role)
    config.save_pretrained(folder)
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    specials = tekken["config"]["default_num_special_tokens"]
    tekken["config"]["default_vocab_size"] = min(config.vocab_size, specials + len(tekken["vocab"]))
    cut = folder / "tekken-cut.json"
    cut.write_text(json.dumps(tekken))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=MistralConverter(str(cut)).converted(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    cut.unlink()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_weights(shape: Shape, folder: Path) -> None:
    """Random weights of the policy, which both sides of the training load."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(model_config(shape, "policy"), dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)


def texts(count: int, words: int, seed: int) -> list[str]:
    """Passages of the README of so many words, each with a number of its own."""
    source, rng = (ROOT / "README.md").read_text().split(), random.Random(seed)
    begins = (rng.randrange(len(source) - words) for _ in range(count))
    return [f"{number} {' '.join(source[begin : begin + words])}" for number, begin in enumerate(begins)]


# --- the device ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a device can do at most: FLOP/s and bytes/s."""

    device: str
    flops: float
    bandwidth: float


def measured_peak(dtype: str) -> Peak:
    import torch

    gpu = torch.cuda.is_available()
    device, size, length = ("cuda", 8192, 2**32) if gpu else ("cpu", 512, 2**26)

    def seconds(work: Callable[[], Any], times: int = 10) -> float:
        found = []
        for _ in range(4):
            begin = time.perf_counter()
            for _ in range(times):
                work()
            if gpu:
                torch.cuda.synchronize()
            found.append((time.perf_counter() - begin) / times)
        return min(found)

    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    product = torch.empty_like(a)
    read, written = (torch.zeros(length, device=device, dtype=torch.uint8) for _ in range(2))
    return Peak(
        torch.cuda.get_device_name() if gpu else "CPU",
        2 * size**3 / seconds(lambda: torch.matmul(a, b, out=product)),
        2 * length / seconds(lambda: written.copy_(read)),
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs: parameters that are multiplied, their bytes, and bytes of the KV cache of a token."""

    multiplied: int
    weight_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, config: Any, dtype: str) -> Cost:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        size = next(model.parameters()).element_size()
        embedding = model.get_input_embeddings().weight.numel()
        multiplied = sum(parameter.numel() for parameter in model.parameters()) - embedding
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        return cls(multiplied, multiplied * size, cache)

    def serving_seconds(self, usage: Usage, sequences: int, peak: Peak) -> float:
        """Least seconds for calls in batches of so many sequences."""
        generated, calls = usage.completion_tokens, usage.calls_engine
        context = (usage.prompt_tokens + generated / 2) / calls
        moved = generated / min(sequences, calls) * self.weight_bytes + generated * context * self.cache_bytes
        return max(2 * self.multiplied * computed_tokens(usage) / peak.flops, moved / peak.bandwidth)

    def training_seconds(self, tokens: float, peak: Peak) -> float:
        """Least seconds for KTO with LoRA and recomputed activations on so many tokens."""
        return 2 * self.multiplied * tokens * FORWARD_PASSES / peak.flops


def computed_tokens(usage: Usage) -> float:
    return usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens


# --- the measurements ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the table; None is shown as a dash."""

    what: str
    ours: float
    alone: float | None = None
    roofline: float | None = None
    aim: float | None = None


def configuration(shape: Shape, folder: Path) -> DmapoConfig:
    """configs/dmapo.yaml with the models and prompts in a folder, on one device."""
    prompts = texts(shape.prompts, shape.words, seed=0)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    values: dict[str, Any] = {
        "prompts.sources": [{"type": "jsonl", "path": str(folder / "prompts.jsonl"), "column": "prompt"}],
        "prompts.val_fraction": 0.0,
        "prompts.num_shards": shape.shards,
        # No response ends early, and no verdict is asked for again: every candidate costs the same four calls.
        "candidates.sampling.max_tokens": shape.new_tokens,
        "candidates.sampling.extra": {"ignore_eos": True},
        # What `auto` chooses for such lengths. Its stage would keep judges and critic from sharing an engine.
        "judge.layout": "shared_first",
        **{f"{role}.sampling.max_tokens": shape.reply_tokens for role in ("judge", "critic")},
        **{f"{role}.asking.retries": 0 for role in ("judge", "critic")},
        "failure.max_error_rate": 1.0,
    }
    for role in ("policy", "judge"):
        values |= {
            f"models.{role}.model": str(folder / role),
            f"models.{role}.dtype": shape.dtype,
            f"models.{role}.args": {"load_format": "dummy", **shape.args},
            f"models.{role}.placement.max_actors": 1,
        }
    return load_config(
        DmapoConfig, str(ROOT / "configs" / "dmapo.yaml"), [f"{key}={json.dumps(v)}" for key, v in values.items()]
    )


def serving(shape: Shape, folder: Path, executor: str, peak: Peak) -> list[Figure]:
    """The pipeline from prompts to gate, and the calls of judges and critic through vLLM alone."""
    config = configuration(shape, folder)
    settings = run_settings(config, str(folder / "run"))
    outcome = execute(
        dmapo(config, str(folder / "run")), settings, executor_of(config, executor), to_group="gate",
        console=Console(stderr=True),
    )  # fmt: skip
    if outcome.failures:
        sys.exit("; ".join(f"{name}: {failure.reason}" for name, failure in outcome.failures.items()))
    usage = {name: result.usage for name, result in outcome.results.items()}
    drawn, judged = usage["candidates"], usage["judge"] + usage["critic"]
    candidates = outcome.results["candidates"].rows["candidates"]

    root, model = Folder(settings.session.calls_root), config.models["judge"].weights()["model"]
    (asked,) = (model_folder(root, identity) for identity in identities(root) if identity["model"] == model)
    calls = logged_calls(row for part in asked.names(".parquet") for row in read_part(asked, part).to_pylist())
    assert len(calls) == judged.calls_engine, f"{len(calls)} calls in the log, {judged.calls_engine} made"
    spec = config.models["judge"].spec()
    alone = in_own_process(bare_loop, spec, calls)

    def seconds(used: Usage) -> float:
        return used.device_seconds - used.start_seconds

    def bound(role: str, used: Usage) -> float:
        sequences = max_sequences(config.models[role].spec(), cpu=peak.device == "CPU")
        return Cost.of(model_config(shape, role), shape.dtype).serving_seconds(used, sequences, peak)

    per = {name: tokens / judged.calls_engine for name, tokens in vars(judged).items() if name.endswith("_tokens")}
    print(
        f"{candidates} candidates of {shape.new_tokens} tokens, {len(calls)} calls of judges and critic: "
        f"{per['prompt_tokens']:.0f} prompt tokens a call, {per['cached_tokens']:.0f} of them cached, "
        f"{per['completion_tokens']:.0f} generated (alone: {alone.completion_tokens / len(calls):.0f})"
    )
    work, work_alone, least = computed_tokens(judged), computed_tokens(alone), bound("judge", judged)
    return [
        Figure("candidates/s", candidates / seconds(drawn), None, candidates / bound("policy", drawn)),
        Figure("judged candidates/s", candidates / seconds(judged), candidates / alone.wall_seconds,
               candidates / least, 20),
        Figure("computed tokens/s", work / seconds(judged), work_alone / alone.wall_seconds, work / least, 30_000),
        Figure("prefix hit rate, %", 100 * (judged.prefix_hit_rate or 0), 100 * (alone.prefix_hit_rate or 0)),
    ]  # fmt: skip


def training(shape: Shape, folder: Path, peak: Peak) -> list[Figure]:
    """KTO through the train stage, and through TRL alone."""
    in_own_process(write_weights, shape, folder / "policy")
    settings = {
        "method": "kto", "dtype": shape.dtype, "epochs": 1, "num_workers": 1, "global_batch": shape.batch,
        "batch_size": shape.batch, "save": "adapter", "save_steps": 10_000,
    }  # fmt: skip
    task = Task(str(folder / "policy"), MAX_LENGTH, settings)
    columns = [texts(shape.rows, shape.words, seed) for seed in range(3)]
    tokens = write_data(folder / "data", zip(*columns, strict=True), "kto", task.model)
    ours, plain = (run(side, task, folder / "data", folder / side) for side in ("ours", "plain"))
    assert ours["steps"] == plain["steps"] == shape.rows // shape.batch, (ours, plain)
    print(f"{shape.rows} rows of {tokens / shape.rows:.0f} tokens, {ours['steps']} steps of KTO with LoRA")
    least = Cost.of(model_config(shape, "policy"), shape.dtype).training_seconds(tokens, peak)
    return [Figure("train tokens/s", tokens / ours["seconds"], tokens / plain["seconds"], tokens / least)]


def table(figures: list[Figure]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"

    def share(a: float, b: float | None) -> str:
        return "–" if b is None else f"{a / b:.3f}"

    heads = ("figure", "Quorum", "alone", "ratio", "roofline", "of it", "aim (H200)")
    lines = [heads] + [
        (f.what, number(f.ours), number(f.alone), share(f.ours, f.alone), number(f.roofline),
         share(f.ours, f.roofline), number(f.aim))
        for f in figures
    ]  # fmt: skip
    return "\n".join(f"{line[0]:<20}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what one GPU gives, beside vLLM, TRL and a roofline")
    parser.add_argument("--shape", choices=SHAPES, default="published")
    parser.add_argument("--parts", nargs="+", choices=("serving", "training"), default=("serving", "training"))
    parser.add_argument("--executor", choices=EXECUTORS, default="ray")
    given = parser.parse_args(arguments)
    shape, took = SHAPES[given.shape], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, begin = Path(scratch), time.monotonic()
        for role in ("policy", "judge"):
            write_model(shape, role, folder / role)
        peak = in_own_process(measured_peak, shape.dtype)
        print(
            f"{peak.device}: {peak.flops / 1e12:,.2f} TFLOP/s in {shape.dtype}, {peak.bandwidth / 1e12:,.3f} TB/s; "
            f"models of {given.shape} shape"
        )
        took["models"] = time.monotonic() - begin
        figures: list[Figure] = []
        for part in given.parts:
            begin = time.monotonic()
            if part == "serving":
                figures += serving(shape, folder, given.executor, peak)
            else:
                figures += training(shape, folder, peak)
            took[part] = time.monotonic() - begin
    print(table(figures))
    print("; ".join(f"{part} {seconds:.0f} s" for part, seconds in took.items()))


if __name__ == "__main__":
    main()
