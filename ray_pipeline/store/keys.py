"""Content-addressed keys of prompts, candidates, calls and stages.

All keys are hexadecimal BLAKE2b digests of canonical JSON, so they do not depend on dict order, the process,
the machine or the position of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.store.outside import storable

#: Fixed number of buckets of the call log; every shard count divides it, so that a shard is a set of buckets.
NUM_BUCKETS = 1024

_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")
#: Signs of code, a table or a quote in a text whose lines have no blanks at their ends. An apostrophe within a word, or
#: indentation of the first line, is none.
_VERBATIM = re.compile(r"""[\t`|"“”„«»‹›‘「」『』]|~~~|</?[a-zA-Z]|(?<!\w)'|'(?!\w)|\n[^\S\n]""")
#: A gap in a line that does not follow punctuation; two lines with one are columns.
_GAP = re.compile(r"[^\s.,:;!?][^\S\n]{2,}\S")


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: the value contains NaN or an infinity, which JSON does not have.
        TypeError: the value is not plain data.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, size: int = 16) -> str:
    """Hex digest of plain data; `size` is in bytes."""
    return hashlib.blake2b(canonical_json(value).encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def normalise_text(text: str) -> str:
    """The form by which texts are told apart; what is sent and stored is the text as it stood.

    In prose: NFC, `\\n` line ends, runs of blanks as one, trimmed. In a text with code, a table or a quote, blanks and
    composition can be the very subject, so only line ends that are all `\\r\\n` and blanks around the text are ignored.
    """
    text = storable(text.replace("\x00", ""))
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")]
    prose = "\n".join(lines)
    if _VERBATIM.search(prose) or sum(bool(_GAP.search(line)) for line in lines) > 1:
        text = text.rstrip()
        text = text[text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1 :]
        return text.replace("\r\n", "\n") if text.count("\r") == text.count("\n") == text.count("\r\n") else text
    return _BLANK_LINES.sub("\n\n", _SPACES.sub(" ", unicodedata.normalize("NFC", prose)))


def normalise_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The form by which conversations are told apart: role, and normalised content."""
    return [{"role": m["role"].strip().lower(), "content": normalise_text(m["content"])} for m in messages]


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Id of a conversation: 32 hex digits of its normalised messages."""
    return digest(["prompt", normalise_messages(messages)])


def bucket_of(prompt: str) -> int:
    """Bucket 0..1023 of a prompt id."""
    return int(prompt, 16) % NUM_BUCKETS


def shard_of(prompt: str, num_shards: int) -> int:
    """Shard of a prompt id. Equals `bucket_of(...) % num_shards` because `num_shards` divides 1,024."""
    return int(prompt, 16) % num_shards


def check_num_shards(num_shards: int) -> int:
    """Return `num_shards`.

    Raises:
        ValueError: it does not divide 1,024; the message names the nearest numbers that do.
    """
    if num_shards < 1 or NUM_BUCKETS % num_shards:
        good = [2**i for i in range(11)]
        near = sorted(good, key=lambda n: (abs(n - num_shards), n))[:2]
        raise ValueError(
            f"num_shards must divide {NUM_BUCKETS} (a power of two up to it), not {num_shards}; "
            f"the nearest are {' and '.join(map(str, sorted(near)))}"
        )
    return num_shards


def candidate_id(prompt: str, generator: Mapping[str, Any], sampling: Mapping[str, Any], k: int) -> str:
    """Id of a generator's k-th response to a prompt."""
    return digest(["candidate", prompt, generator, sampling, k])


def derived_seed(*parts: Any) -> int:
    """A 31-bit seed that depends only on `parts` (prompt id, run seed, k, attempt, …)."""
    return int(digest(["seed", *parts], size=8), 16) % (2**31 - 1)


def call_key(identity: Mapping[str, Any], messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> str:
    """Key of one LLM call: the model's identity, the messages, and the sampling parameters (with the grammar)."""
    return digest(["call", identity, [dict(m) for m in messages], sampling])


def fingerprint(name: str, version: int, config: Any, inputs: Mapping[str, str], external: Mapping[str, str]) -> str:
    """Fingerprint of a stage: 16 hex digits; stages with equal fingerprints have the same output.

    Args:
        config: the slice of the configuration that the stage reads, as plain data.
        inputs: role → fingerprint of the input stage.
        external: content digests of files, Hub commits and model identities.
    """
    return digest(["stage", name, version, config, dict(inputs), dict(external)], size=8)


def unit_hash(*parts: Any) -> float:
    """A number in [0, 1) that depends only on `parts`; used for splits, caps and seeded shuffles."""
    value = int(digest(["unit", *parts], size=8), 16) / 2**64
    return min(value, math.nextafter(1.0, 0.0))
