import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.evaluate import stage
from ray_pipeline.evaluate.stage import ReportSettings
from ray_pipeline.graph.stage import StageResult, WholeInput
from ray_pipeline.policy.comparisons import EvaluateSettings
from ray_pipeline.policy.perplexity import Perplexity, encode_row, perplexity
from ray_pipeline.store.files import Folder
from tests.planted import random_world, write_run

WORDS = ["<unk>", "<eos>", "<user>", "<bot>", "<end>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
# Rewrites every earlier turn once there is an answer: the prompt's ids are then no prefix of the conversation's.
REWRITING = "{% if messages | length > 1 %}{{ '<end> ' }}{% endif %}" + TEMPLATE
ROWS = [
    ([{"role": "user", "content": "a b"}], "c d e"),
    ([{"role": "user", "content": "c"}], "f"),
    ([{"role": "user", "content": "a b c d"}], "a a a a a a"),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def nll_one_by_one(path: Path, prompt: str, completion: str) -> list[float]:
    """Without batch or padding: minus log p of each completion token."""
    model = LlamaForCausalLM.from_pretrained(path).eval()
    row, start = ids(f"{prompt} {completion}"), len(ids(prompt))
    with torch.inference_mode():
        logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
    return [-float(logp[t - 1, row[t]]) for t in range(start, len(row))]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_against_one_row_at_a_time(model_path: Path, batch_size: int) -> None:
    found = perplexity(model_path, ROWS, batch_size=batch_size)
    texts = [(f"<user> {m[0]['content']} <eos> <bot>", f"{answer} <eos>") for m, answer in ROWS]
    nll = [x for prompt, answer in texts for x in nll_one_by_one(model_path, prompt, answer)]
    assert (found.tokens, found.rows, found.skipped_too_long) == (len(nll), 3, 0)
    assert found.nll_per_token == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_too_long_rows_are_left_out_and_counted(model_path: Path) -> None:
    found = perplexity(model_path, ROWS, max_length=9)
    assert (found.rows, found.skipped_too_long) == (2, 1)
    assert found.nll_per_token == pytest.approx(perplexity(model_path, ROWS[:2]).nll_per_token, rel=1e-6)
    nothing = perplexity(model_path, ROWS, max_length=2)
    assert (nothing.ppl, nothing.tokens, nothing.skipped_too_long) == (None, 0, 3)


def test_the_boundary_is_exact(model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    row = encode_row(tokenizer, *ROWS[0])
    assert (row.ids, row.start) == (ids("<user> a b <eos> <bot> c d e <eos>"), 5)


def test_a_template_that_rewrites_the_prompt_falls_back_to_what_an_engine_reads(model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = REWRITING
    row = encode_row(tokenizer, *ROWS[0])
    assert (row.ids, row.start) == (ids("<user> a b <eos> <bot> c d e <eos>"), 5)


# --- the rows that the evaluate stage measures ------------------------------------------------------------------------


@pytest.mark.parametrize("most", [512, 3])
def test_only_held_out_desirable_answers_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: Path, most: int
) -> None:
    world = random_world(60, seed=8)
    write_run(tmp_path, world)
    asked: dict[str, list[Any]] = {}

    def measure(path: str, rows: list[Any], **options: Any) -> Perplexity:
        asked[path] = rows
        return Perplexity(2.0, math.log(2), 1, len(rows))

    here = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 2.0},
        remote=lambda **resources: lambda function: SimpleNamespace(remote=function),
        get=lambda value: value,
    )
    monkeypatch.setitem(sys.modules, "ray", here)
    monkeypatch.setattr("ray_pipeline.policy.perplexity.perplexity", measure)
    base = ModelSettings(model=str(model_path))
    made = stage.evaluate(EvaluateSettings(perplexity_rows=most), ReportSettings(run_name="run"), base, 60, [])
    results = {
        name: StageResult(name, mark, str(tmp_path / name), 1, (), {}, {}, role=role)
        for name, mark, role in (("datasets", "f2", "datasets"), ("train", "f3", "policy"))
    }
    folder = Folder(str(tmp_path / "evaluate"))
    given = WholeInput(results, folder, folder, "f4", 1, made.work.settings, print, lambda *step: None)
    found = stage._perplexities(given.inputs, made.work.settings)

    held_out = [row for file in (tmp_path / "datasets/kto/val").glob("*") for row in pq.read_table(file).to_pylist()]
    good = sorted((row for row in held_out if row["label"]), key=lambda row: row["candidate_id"])
    assert 3 < len(good) < len(held_out)
    wanted = [(row["prompt"], row["completion"][-1]["content"]) for row in good][:most]
    assert asked == {str(model_path): wanted, str(tmp_path / "train" / "merged"): wanted}
    assert {name: p.rows for name, p in found.items()} == {"base": len(wanted), "policy": len(wanted)}


def test_perplexity_of_an_adapter_on_its_base_is_that_of_the_merged_model(model_path: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_path), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "merged")
    base, merged = perplexity(model_path, ROWS), perplexity(tmp_path / "merged", ROWS)
    adapted = perplexity(model_path, ROWS, adapter=str(tmp_path / "adapter"))
    assert adapted.ppl == pytest.approx(merged.ppl, rel=1e-5) and adapted.ppl != pytest.approx(base.ppl, rel=1e-3)


def test_the_report_measures_the_adapter_where_only_that_was_saved(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, random_world(30, seed=3))
    measured: list[tuple[str, Any]] = []

    def measure(path: str, rows: list[Any], **options: Any) -> Perplexity:
        measured.append((path, options["adapter"]))
        return Perplexity(2.0, math.log(2), 1, len(rows))

    monkeypatch.setattr("ray_pipeline.policy.perplexity.perplexity", measure)
    base = ModelSettings(model=str(model_path))
    made = stage.evaluate(EvaluateSettings(), ReportSettings(run_name="run"), base, 60, [])
    results = {
        name: StageResult(name, mark, str(tmp_path / name), 1, (), {}, {}, role=role)
        for name, mark, role in (("datasets", "f2", "datasets"), ("train", "f3", "policy"))
    }
    folder = Folder(str(tmp_path / "evaluate"))
    given = WholeInput(results, folder, folder, "f4", 1, made.work.settings, print, lambda *step: None)
    (tmp_path / "train" / "adapter").mkdir(parents=True)
    stage._perplexities(given.inputs, made.work.settings)
    (tmp_path / "train" / "merged").mkdir()
    stage._perplexities(given.inputs, made.work.settings)
    alone, whole = (str(tmp_path / "train" / name) for name in ("adapter", "merged"))
    assert measured == [(str(model_path), None), (str(model_path), alone), (str(model_path), None), (whole, None)]
