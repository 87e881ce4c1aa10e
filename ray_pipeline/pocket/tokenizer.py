"""The tokenizer of the pocket world: one token per word of the world, bytes for all else.

A byte-level BPE without merges: text is cut by one regular expression, a piece that is in the vocabulary is one token
(`ignore_merges`, as in Llama 3), any other piece falls back to its bytes. So any text round-trips exactly, every token
is plain text (as xgrammar requires for JSON grammars), and a reply of a judge is about ten tokens.

Control tokens: `<|system|> <|user|> <|assistant|> <|end|> <|pad|>`. The chat template breaks the string `<|` in message
text into `< |`, so apply_chat_template never turns a user's text into a control token.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ray_pipeline.pocket import tasks

CONTROL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

JSON_PIECES = (
    '{"reason": "',
    '", "score": ',
    '", "failure_type": "',
    '", "flawed": ',
    '", "choice": "',
    '"}',
)

WORDS = sorted(
    {
        *tasks.NOUNS,
        *tasks.NUMBERS,
        *filter(None, tasks.OPENINGS),
        *tasks.TASK_TYPES,
        *tasks.FILLER_WORDS,
        *tasks.REFUSAL_WORDS,
        *tasks.WAY_WORDS,
        *tasks.RUBRICS,
        *tasks.FAILURES,
        *tasks.FAILURES.values(),
        *["of", "from", "task", "answer", "a", "b", "judge", "critic", "compare", "true", "false"],
    }
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | replace('<|', '< |') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_LENGTH = 2048


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the pocket models; the same bytes every time."""
    byte_chars = _byte_chars()

    def spelled(text: str) -> str:
        return "".join(byte_chars[byte] for byte in text.encode())

    pieces = [*CONTROL_TOKENS, *(byte_chars[byte] for byte in range(256))]
    pieces += [spelled(piece) for piece in JSON_PIECES]
    for word in WORDS:
        pieces += [spelled(word), spelled(" " + word)]
    pieces.append(spelled(" :"))
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    pattern = "|".join([*(re.escape(piece) for piece in JSON_PIECES), " ?[a-z]+", " ?[0-9]+", " :"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def word_twins(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """Token ids of each word without and with a leading space; a model starts with similar embeddings for both."""
    vocab = tokenizer.get_vocab()
    return [
        (vocab[word], vocab["Ġ" + word])
        for word in WORDS
        if len(word.encode()) > 0 and "Ġ" + word in vocab and word in vocab
    ]


def _byte_chars() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
