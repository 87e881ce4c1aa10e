"""Token ids of long prompts that share parts: each part is tokenised once.

The judges and the critic of a candidate are asked about the same instruction and response, and each of them asks the
same about all candidates. A prompt is cut at the ends of lines, the ids of each piece are kept, and the ids of the
prompt are those of its pieces: exactly the ids that the tokenizer gives for the whole.

That holds where no token spans the cut, so that no merge of byte-pair encoding crosses it, and where the tokenizer's
rules split the text there whatever characters surround it. Both are checked for the tokenizer at hand; if they do not
hold (tokenizers that put a space before every text, as Llama 2's does), prompts are tokenised as a whole.
"""

from __future__ import annotations

import array
import functools
import itertools
import re
from typing import Any

#: Where a text may be cut: before newlines (GPT-2 keeps a run of them whole only at the end of a text), or behind them
#: (later tokenizers join newlines to the full stop before them).
_CUTS = (re.compile(r"(?<=\S)(?=\n)"), re.compile(r"(?<=\n)(?=\S)"))
#: Characters as byte-level vocabularies spell them.
_SPELLED = str.maketrans({"Ċ": "\n", "Ġ": " ", "ĉ": "\t", "č": "\r"})
#: What surrounds the cuts that are tried: every class of characters that tokenizers' rules tell apart.
_BEFORE = (
    "word",
    "Word",
    "1234",
    "it's",
    "'",
    ".",
    "?!",
    ">",
    "}",
    "_",
    "é",
    "中文",
    "का",
    "🙂",
    "e\u0301",
    "end ",
    "x\t",
    "\r",
)
_BETWEEN = ("\n", "\n\n", "\n\n\n", "\n ", "\n\n  ", "\n\t", "\n \n", "\r\n")
_BEHIND = ("word", "Word", "1234", "'s", "'", ".", "<", "{", "_", "é", "中文", "का", "🙂", "\u0301", "- a")
#: Pieces whose ids are kept: those of the candidates about which an engine is asked at the same time.
_KEPT = 65_536


class TokenPieces:
    """Token ids of texts without special tokens added.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        cut: where texts are cut; None if they are tokenised as a whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.cut = next((cut for cut in _CUTS if self._may_cut(cut)), None)
        self._known = functools.lru_cache(_KEPT)(self._ids)

    def ids(self, text: str) -> list[int]:
        """As `tokenizer.encode(text, add_special_tokens=False)`. Not for several threads at once."""
        if self.cut is None:
            return self._whole(text)
        found: list[int] = []
        for piece in self.cut.split(text):
            found.extend(self._known(piece))
        return found

    def _ids(self, piece: str) -> array.array[int]:
        # Without offsets, and without holding the interpreter's lock.
        [encoded] = self._backend.encode_batch_fast([piece], add_special_tokens=False)
        return array.array("l", encoded.ids)

    def _whole(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _may_cut(self, cut: re.Pattern[str]) -> bool:
        if self._backend is None or type(self._backend.model).__name__ != "BPE":
            return False
        if any(token.lstrip or token.rstrip for token in self._tokenizer.added_tokens_decoder.values()):
            return False  # such a token takes up blanks around it, also those behind the cut
        if any(cut.search(token.translate(_SPELLED)) for token in self._tokenizer.get_vocab()):
            return False
        texts = ["".join(parts) for parts in itertools.product(_BEFORE, _BETWEEN, _BEHIND)]
        # The whole first: the call also removes what tokenizer.json says of cutting and padding.
        return all(
            self._whole(text) == [token for piece in cut.split(text) for token in self._ids(piece)] for text in texts
        )
