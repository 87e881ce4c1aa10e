"""Tiny models with random weights in Hugging Face format, made in about a second.

They answer nonsense, but every engine and trainer takes them for real ones: Qwen3 and Llama
architectures, a byte-level BPE tokenizer trained on the spot (so any text has tokens), and a ChatML
template that knows ``enable_thinking``. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

#: `importorskip` would import it, for seconds, also where no test of the file is run.
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# ChatML as Qwen3 writes it: with thinking switched off the reply starts behind an empty thought.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{%- if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

# The second template has no thinking, so that an argument it does not know can be tried on it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}[{{ message['role'] }}]\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}[assistant]\n{% endif %}"
)

_CORPUS = [
    "Rate the response for helpfulness, factuality and conciseness with an integer from 1 to 10.",
    "Is the reasoning circular, unsupported, contradictory or unspecified? Answer yes or no.",
    '{"score": 7, "reason": "the answer is correct, short and complete"}',
    "Sort these words, repeat them, reverse them, count them, and add the largest two numbers: 0 1 2 3 4 5 6 7 8 9",
    "user assistant system think response instruction question answer better worse both tie",
]


def make_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Train a byte-level BPE tokenizer of about 500 tokens, save it in ``path`` and return it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 4, trainer)
    # Like Qwen3's: control words that the tokenizer parses although they are not marked special.
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return tokenizer


def _save(config: Any, path: Path, seed: int, dtype: str) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        # The default spread of 0.02 makes every next token equally likely, and T 0 a matter of rounding.
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(path)
    finally:
        torch.random.set_rng_state(state)
    return path


def make_qwen3(
    path: Path | str,
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    context: int = 2048,
    dtype: str = "float32",
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """A Qwen3 causal LM with random weights (2 heads of 32, one key-value head) and its tokenizer."""
    from transformers import Qwen3Config

    path = Path(path)
    tokenizer = make_tokenizer(path, chat_template=chat_template)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest size that vLLM's CPU attention has a kernel for
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(config, path, seed, dtype)


def make_llama(
    path: Path | str,
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    context: int = 2048,
    dtype: str = "float32",
    chat_template: str | None = PLAIN_TEMPLATE,
) -> Path:
    """A Llama causal LM with random weights whose template knows no ``enable_thinking``."""
    from transformers import LlamaConfig

    path = Path(path)
    tokenizer = make_tokenizer(path, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(config, path, seed, dtype)


def make_lora(path: Path | str, base: Path | str, seed: int = 0, *, rank: int = 4, scale: float = 1.0) -> Path:
    """A LoRA adapter with random weights for ``base``, strong enough to change its replies.

    ``scale`` is the spread of the B matrices, which PEFT starts at zero (an adapter without effect).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    modules = ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * scale
    adapted.save_pretrained(path)
    return Path(path)
