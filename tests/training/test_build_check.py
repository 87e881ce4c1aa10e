"""What building the trainer would refuse is refused before workers start, by key and with a remedy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from ray_pipeline.training.build_check import check_build
from ray_pipeline.training.fit import fit
from ray_pipeline.training.methods import METHODS, TrainingInputError

from .conftest import TEMPLATE, MakeSpec
from .shapes import FAMILIES, QUIRKS, make_model

Edit = Callable[..., str]


@pytest.fixture
def edited(tiny_model: str, tmp_path: Path) -> Edit:
    """`edited(file, **values)`: a copy of the tiny model with other values in a JSON file."""

    def edit(file: str, **values: Any) -> str:
        folder = Path(shutil.copytree(tiny_model, tmp_path / "edited"))
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return str(folder)

    return edit


@pytest.mark.parametrize("method", list(METHODS))
def test_good_settings_pass(make_spec: MakeSpec, method: str) -> None:
    check_build(make_spec(method, use_gpu=True, shard="fsdp", dtype="bfloat16", gradient_checkpointing=True))
    check_build(make_spec(method, lora=None, trainer_args={"optim": "adafactor"}))


@pytest.mark.parametrize(
    ("changes", "built"),
    [({}, 1), ({"shard": "fsdp", "use_gpu": True}, 1), ({"lora": None}, 2), ({"trainer_args": {"optim": "none"}}, 3)],
)
def test_the_base_is_built_once(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], built: int
) -> None:
    """And once for the reference of full fine-tuning, and again to find the setting that is refused."""
    build, count = AutoModelForCausalLM.from_config, []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *args, **more: (count.append(1), build(*args, **more))[1]
    )
    with pytest.raises(TrainingInputError, match="optim") if "trainer_args" in changes else contextlib.nullcontext():
        check_build(make_spec("dpo", **changes))
    assert len(count) == built


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transformer_layer_cls_to_wrap": ["NoLayer"]}, "fsdp_config cannot be used: .*NoLayer"),
        ({"auto_wrap_policy": "MY_WRAP"}, "fsdp_config cannot be used: .*MY_WRAP"),
        ({"state_dict_type": "HALF"}, "fsdp_config cannot be used: .*HALF"),
        ({"transformer_layer_class": "X"}, "fsdp_config.transformer_layer_class: there is no such .* reshard_after_fo"),
        (7, "fsdp_config: 7 is neither a mapping nor"),
        ("/no/such/file.json", "fsdp_config cannot be used: .*/no/such/file.json"),
    ],
)
def test_settings_of_fsdp(make_spec: MakeSpec, given: Any, words: str) -> None:
    check_build(make_spec("kto"))  # a method's first import may write into it, whatever the settings
    before = dict(os.environ)
    with pytest.raises(TrainingInputError, match=words):
        check_build(make_spec("kto", use_gpu=True, shard="fsdp", trainer_args={"fsdp_config": given}))
    assert dict(os.environ) == before
    for valid in ({"fsdp_version": 2}, None):
        check_build(make_spec("kto", use_gpu=True, shard="fsdp", trainer_args={"fsdp_config": valid}))
    assert dict(os.environ) == before


@pytest.mark.parametrize("given", ["/no/such/file.json", 7, {"zero_optimization": 3}])
def test_settings_of_deepspeed(make_spec: MakeSpec, given: Any) -> None:
    with pytest.raises(TrainingInputError, match=r"trainer_args\.deepspeed cannot be used: "):
        check_build(make_spec("kto", use_gpu=True, shard="zero3", trainer_args={"deepspeed": given}))
    check_build(make_spec("kto", use_gpu=True, shard="zero3", trainer_args={"deepspeed": {"zero_optimization": {}}}))


def test_a_device_that_only_workers_have_is_not_asked_for(make_spec: MakeSpec) -> None:
    flash = {"attn_implementation": "flash_attention_2"}
    args = {"tf32": True, "precompute_ref_log_probs": True, "model_init_kwargs": flash}
    check_build(make_spec("dpo", use_gpu=True, trainer_args=args))
    check_build(make_spec("kto", use_gpu=True, quantization="nf4"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attn_implementatoin": "sdpa"}, "model_init_kwargs.attn_implementatoin: neither .* has such a setting"),
        ({"attn_implementation": "flash"}, "transformers has no 'flash'; choose from eager, .*flash_attention_2.*sdpa"),
        ({"num_hidden_layers": "many"}, "model_init_kwargs cannot be used: .*num_hidden_layers"),
    ],
)
def test_arguments_of_loading_the_base(make_spec: MakeSpec, given: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingInputError, match=words):
        check_build(make_spec("kto", trainer_args={"model_init_kwargs": given}))


def test_arguments_of_loading_the_base_that_are_there(make_spec: MakeSpec) -> None:
    given = {"attn_implementation": "sdpa", "low_cpu_mem_usage": True, "use_cache": False, "use_kernels": False}
    check_build(make_spec("kto", trainer_args={"model_init_kwargs": given}))


def test_a_base_that_is_quantized_another_way(make_spec: MakeSpec, edited: Edit) -> None:
    model = edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    check_build(make_spec("kto", model=model))
    with pytest.raises(TrainingInputError, match=r"quantization: .* are quantized already \(gptq\); remove the key"):
        check_build(make_spec("kto", model=model, use_gpu=True, quantization="nf4"))


@pytest.mark.parametrize(
    ("method", "lora", "words"),
    [
        ("kto", "q_proj,v_proj", r"lora.target_modules: 'q_proj,v_proj' .* write names as a list; .* q_proj, up_proj"),
        (
            "dpo",
            ["query"],
            r"lora.target_modules: \['query'\] cannot be adapted: .*; the linear layers of .* are ",
        ),
        ("sft", ["input_layernorm"], "lora.target_modules: .*LlamaRMSNorm.* not supported"),
        ("dpo", ["lm_head"], "DPOTrainer cannot be built .*Remove `'lm_head'` from your `target_modules`"),
        ("kto", ["q_proj", "lm_head"], "KTOTrainer cannot be built .*Remove `'lm_head'`"),
    ],
)
def test_modules_that_cannot_be_adapted(make_spec: MakeSpec, method: str, lora: Any, words: str) -> None:
    with pytest.raises(TrainingInputError, match=words):
        check_build(make_spec(method, lora={"target_modules": lora}))


def test_a_training_is_refused_before_it_needs_a_cluster(make_spec: MakeSpec) -> None:
    with pytest.raises(TrainingInputError, match=r"lora.target_modules"):
        fit(make_spec("kto", lora={"target_modules": "q_proj,v_proj"}))


@pytest.mark.parametrize("method", ["kto", "simpo"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embeddings_that_are_the_head_too(make_spec: MakeSpec, tmp_path: Path, method: str, module: str) -> None:
    model = make_model(tmp_path / "tied", "llama", ["tied"])
    with pytest.raises(
        TrainingInputError, match=r"lora.target_modules: .*shares with its output head.* leave them out"
    ):
        check_build(make_spec(method, model=model, lora={"target_modules": ["q_proj", module]}))
    untied = make_model(tmp_path / "untied", "llama")
    check_build(make_spec(method, model=untied, lora={"target_modules": ["q_proj", "embed_tokens"]}))


@pytest.mark.parametrize(
    ("method", "args", "words"),
    [
        ("kto", {"weight_decay": 0.1, "optim": "adamwx"}, "trainer_args.optim: 'adamwx' cannot be used: .* select one"),
        ("orpo", {"optim": "adamw_bnb_8bit"}, "trainer_args.optim: 'adamw_bnb_8bit' cannot be used: .*bitsandbytes"),
        ("dpo", {"loss_type": ["exo_pair"]}, "trainer_args.loss_type: .* Label smoothing must be greater"),
        ("sft", {"pad_token": "<none>"}, "trainer_args.pad_token: '<none>' cannot be used: .*not found in the vocab"),
        ("simpo", {"lr_scheduler_kwargs": {"cycle": 1}}, "trainer_args.lr_scheduler_kwargs: .*TypeError.*cycle"),
    ],
)
def test_settings_of_trl(make_spec: MakeSpec, method: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingInputError, match=words):
        check_build(make_spec(method, trainer_args=args))


def test_a_scheduler_that_needs_more(make_spec: MakeSpec) -> None:
    with pytest.raises(TrainingInputError, match=r"KTOTrainer cannot be built .*reduce_lr_on_plateau"):
        check_build(make_spec("kto", lr_scheduler="reduce_lr_on_plateau"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForCond.* is no causal language model",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "names LlamaForSeq.* load it as LlamaForCausalLM"),
        ({"architectures": None}, "names no architecture, .* choose a causal language model"),
        ({"model_type": "lama"}, "cannot read config.json of .*lama"),
    ],
)
def test_architectures_that_are_no_policy(make_spec: MakeSpec, edited: Edit, values: Any, words: str) -> None:
    with pytest.raises(TrainingInputError, match=f"model: .*{words}"):
        check_build(make_spec("dpo", model=edited("config.json", **values)))


def test_a_model_without_its_tokenizer(make_spec: MakeSpec, edited: Edit) -> None:
    model = Path(edited("config.json"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TrainingInputError, match="model: cannot load the tokenizer of"):
        check_build(make_spec("kto", model=str(model)))


@pytest.mark.parametrize("values", [{"temperature": 0.6, "top_p": 0.9}, {"pad_token_id": -1}])
def test_a_generation_config_that_can_be_repaired_passes(make_spec: MakeSpec, edited: Edit, values: Any) -> None:
    check_build(make_spec("kto", model=edited("generation_config.json", **values)))


def test_a_generation_config_that_cannot_be_written(make_spec: MakeSpec, edited: Edit) -> None:
    model = edited("generation_config.json", length_penalty=2.0)
    with pytest.raises(TrainingInputError, match=r"model: .*generation_config.json of .*length_penalty.*correct that"):
        check_build(make_spec("kto", model=model))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}",
            "writes '<think>' where .* drops the thoughts",
        ),
        (TEMPLATE.split("{% if add")[0], "has no generation prompt .* write '<|assistant|>' before each reply"),
        (TEMPLATE.replace("<eos>", ""), "puts no special token behind a reply, .*{{ eos_token }}"),
        ("{{ raise_exception('no turns') }}", "cannot render a question and its reply .no turns."),
        ("{{ messages[0]['content'] }}<eos>", "leaves out the reply of the assistant"),
    ],
)
def test_templates_that_teach_no_reply(make_spec: MakeSpec, edited: Edit, template: str, words: str) -> None:
    model = edited("config.json")
    (Path(model) / "chat_template.jinja").write_text(template)
    with pytest.raises(TrainingInputError, match="model: the chat template of .*" + words.replace("|", r"\|")):
        check_build(make_spec("kto", model=model))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_quirks_of_published_models_pass(make_spec: MakeSpec, tmp_path: Path, name: str) -> None:
    check_build(make_spec("kto", model=make_model(tmp_path / "model", name, QUIRKS)))
