"""Prompts in pieces: the ids are those of the whole, for tokenizers of every kind, and each piece is tokenised once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.token_pieces import TokenPieces
from ray_pipeline.pocket import model_path

TEXTS = [file.read_text() for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]
SPECIAL = ("<|im_start|>", "<|im_end|>")
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BEFORE, BEHIND = r"(?<=\S)(?=\n)", r"(?<=\n)(?=\S)"


def byte_level(regex: str | None = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    if regex is None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def spaced() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces are ▁, one is put before every text, and merges go across everything."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁(?=\w)"), "merged_with_next")
    return made


def whole_lines() -> tokenizers.Tokenizer:
    """Nothing is split, so that its tokens span newlines."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+\n+[^\n]+"), "isolated")
    return made


def trained(made: tokenizers.Tokenizer, size: int = 1200, special: Any = SPECIAL) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS[:3], trainer)
    made.add_special_tokens([AddedToken(token, special=True) if isinstance(token, str) else token for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module", params=["gpt2", "qwen", "llama3"])
def pieces(request: pytest.FixtureRequest) -> tuple[Any, TokenPieces]:
    regex = {"gpt2": None, "qwen": QWEN, "llama3": LLAMA3}[request.param]
    tokenizer = trained(byte_level(regex))
    found = TokenPieces(tokenizer)
    assert found.cut is not None and found.cut.pattern == (BEFORE if regex is None else BEHIND)
    return tokenizer, found


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_texts_get_the_ids_of_the_whole(pieces: tuple[Any, TokenPieces]) -> None:
    tokenizer, found = pieces
    for text in TEXTS:
        assert found.ids(text) == whole(tokenizer, text)
        assert found.ids(text) == whole(tokenizer, text)  # from memory


BLANKS = ["\n", "\n\n", "\r\n", " ", "\t", "  "]
WORDS = ["a", "Word", " b", "12", ".", "...", "'s", "é", "e\u0301", "中", "🙂", "<", ">", *SPECIAL]
PARTS = st.sampled_from(BLANKS) | st.sampled_from(WORDS)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS | st.text(max_size=3), max_size=30))
def test_any_text_gets_the_ids_of_the_whole(pieces: tuple[Any, TokenPieces], parts: list[str]) -> None:
    tokenizer, found = pieces
    assert found.ids("".join(parts)) == whole(tokenizer, "".join(parts))


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained(spaced()),
        trained(whole_lines(), 3000),
        trained(byte_level(), special=[AddedToken("<|end|>", special=True, rstrip=True)]),
        PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("\n", -1.0)], 0))),
    ],
    ids=["a space before every text", "tokens across lines", "a token that takes up blanks", "not byte-pair"],
)
def test_a_tokenizer_for_which_that_does_not_hold_gets_whole_texts(tokenizer: Any) -> None:
    found = TokenPieces(tokenizer)
    assert found.cut is None
    for text in ("a\n\na", TEXTS[0][:500], "<|end|>\n\nx"):
        assert found.ids(text) == whole(tokenizer, text)


def test_what_prompts_share_is_tokenised_once(pieces: tuple[Any, TokenPieces]) -> None:
    tokenizer, _ = pieces
    found = TokenPieces(tokenizer)
    shared = "system text\ninstruction\nand the response\nof a model\n"
    found.ids(shared + "first question\nAnswer:")
    before = found._known.cache_info()
    found.ids(shared + "second question\nAnswer:")
    after = found._known.cache_info()
    assert after.misses == before.misses + 1 and after.hits >= before.hits + 4


def test_prompts_of_the_pocket_judge_are_what_they_were() -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(model_path("pocket:judge")))
    for text in TEXTS[:2]:
        messages = [{"role": "user", "content": text.replace("<|", "")}]
        assert template.token_ids(messages) == whole(template._tokenizer, template.text(messages))


def test_a_length_to_cut_to_in_the_file_of_a_tokenizer_has_no_effect() -> None:
    tokenizer = trained(byte_level())
    tokenizer.backend_tokenizer.enable_truncation(4)
    found = TokenPieces(tokenizer)
    text = "one two three four five six seven\neight nine ten eleven twelve"
    assert found.ids(text) == whole(tokenizer, text) and len(found.ids(text)) > 8
