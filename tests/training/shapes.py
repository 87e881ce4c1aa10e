"""Tiny random models of the families that people align, each with a chat template as its family has it, and with the
quirks of published models."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import TEXT

ROLES = "{% if m['role'] == 'system' %}SYSTEM{% elif m['role'] == 'user' %}USER{% else %}REPLY{% endif %}"
NO_SYSTEM = "{{ raise_exception('System role not supported') }}"
#: What Qwen3 does: only the last reply keeps its thought, and gets an empty one if it has none.
THOUGHTS = (
    "{% set said = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' if '</think>' not in m['content'] else '' }}"
    "{{ m['content'] }}{% else %}{{ said }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """Parts of a chat template (`TEXT` is the message), and the special tokens in them.

    Attributes:
        end: the token that ends a reply; `eos`: the EOS of the family's base models.
    """

    model_type: str
    system: str
    user: str
    reply: str
    prompt: str
    end: str
    eos: str
    special: tuple[str, ...] = ()
    tail: str = ""


FAMILIES = {
    "llama": Family(
        "llama",
        "<|start|>system<|stop|>\n\nTEXT<|eot_id|>",
        "<|start|>user<|stop|>\n\nTEXT<|eot_id|>",
        "<|start|>assistant<|stop|>\n\nTEXT<|eot_id|>",
        "<|start|>assistant<|stop|>\n\n",
        "<|eot_id|>",
        "<|end_of_text|>",
        ("<|start|>", "<|stop|>"),
    ),
    "mistral": Family("mistral", "TEXT\n\n", "[INST] TEXT [/INST]", " TEXT</s>", "", "</s>", "</s>"),
    "qwen3": Family(
        "qwen3",
        "<|im_start|>system\nTEXT<|im_end|>\n",
        "<|im_start|>user\nTEXT<|im_end|>\n",
        "<|im_start|>assistant\nTEXT<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|endoftext|>",
        ("<|im_start|>",),
    ),
    "gemma": Family(
        "gemma3_text",
        "<start_of_turn>system\nTEXT<end_of_turn>\n",
        "<start_of_turn>user\nTEXT<end_of_turn>\n",
        "<start_of_turn>model\nTEXT<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "<eos>",
        ("<start_of_turn>",),
    ),
    "phi3": Family(
        "phi3",
        "<|system|>\nTEXT<|end|>\n",
        "<|user|>\nTEXT<|end|>\n",
        "<|assistant|>\nTEXT<|end|>\n",
        "<|assistant|>\n",
        "<|end|>",
        "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
    ),
}

#: Quirks of published models; without any of the first three, padding has its own token and EOS ends a reply.
QUIRKS = (
    "no pad", "pad is EOS", "base EOS", "list of EOS", "tied", "invalid generation config", "no system role",
    "drops thoughts",
)  # fmt: skip


def chat_template(family: Family, quirks: Collection[str] = ()) -> str:
    def part(text: str, content: str) -> str:
        before, _, after = text.partition("TEXT")
        return f"{{{{ {before!r} }}}}{content}{{{{ {after!r} }}}}"

    plain = "{{ m['content'] }}"
    system = NO_SYSTEM if "no system role" in quirks else part(family.system, plain)
    reply = part(family.reply, THOUGHTS if "drops thoughts" in quirks else plain)
    turns = ROLES.replace("SYSTEM", system).replace("USER", part(family.user, plain)).replace("REPLY", reply)
    start = (
        f"{{% if add_generation_prompt %}}{{{{ {family.prompt!r} }}}}{{% else %}}{{{{ {family.tail!r} }}}}{{% endif %}}"
    )
    return "{% for m in messages %}" + turns + "{% endfor %}" + start


def make_tokenizer(family: Family, quirks: Collection[str] = ()) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = dict.fromkeys(["<pad>", family.end, family.eos, *family.special])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 20, trainers.BpeTrainer(vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet)
    )
    eos = family.eos if "base EOS" in quirks else family.end
    pad = {"no pad": None, "pad is EOS": eos}.get(next((q for q in quirks if "pad" in q), ""), "<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, pad_token=pad, chat_template=chat_template(family, quirks)
    )


def make_model(folder: Path, name: str, quirks: Collection[str] = ()) -> str:
    """Write a model of a family: two layers, two heads of 32 (the smallest that vLLM has a kernel for)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[name]
    tokenizer = make_tokenizer(family, quirks)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if "list of EOS" in quirks:
        ids["eos_token_id"] = tokenizer.convert_tokens_to_ids(list(dict.fromkeys([family.eos, family.end])))
    config = AutoConfig.for_model(
        family.model_type, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings="tied" in quirks, **ids, **({} if name == "phi3" else {"head_dim": 32}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # otherwise all tokens are nearly as likely, and rounding decides
        for weight in model.parameters():
            weight.mul_(1 if weight.dim() == 1 else 3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if "invalid generation config" in quirks:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "top_p": 0.9}))
    return str(folder)
