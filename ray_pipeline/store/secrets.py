"""Keys and passwords: how they are recognised, and the one gate that removes them from text.

A key belongs in the environment of the nodes that use it. `secret_in` finds one in the values of a configuration, which
is then refused before anything is written; `redact` removes keys from messages and logs, whose text comes from servers,
libraries and the command line. Prompts and replies are data and never change here.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

#: What a removed key is replaced with.
REMOVED = "***"

#: The end of an escaped character, at which a word begins as at any other: `%3D`, a newline as `\n`, `\u0026`.
_ESCAPED = r"(?:(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt])|(?<=\\u00[0-9A-Fa-f]{2}))"

#: Texts that are keys by their form: OpenAI and its like, Hugging Face, AWS, GitHub, GitLab, Slack, Google, Groq, xAI,
#: Replicate, NVIDIA, Perplexity, Cerebras, Together, Fireworks, Databricks, Google's OAuth, npm, SendGrid, W&B, JSON
#: web tokens, and what follows `Bearer` or `Basic`.
_FORMS = re.compile(
    r"""
    (?:(?<![A-Za-z0-9])|"""
    + _ESCAPED
    + r""")(?:
        sk-[A-Za-z0-9_-]{8,}
      | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{8,}
      | (?:hf|gsk|r8)_[A-Za-z0-9]{16,}
      | xai-[A-Za-z0-9]{16,}
      | (?:nvapi|pplx|csk)-[A-Za-z0-9_-]{20,}
      | (?:tgp|wandb)_v[0-9]_[A-Za-z0-9_-]{20,}
      | (?:fw|npm)_[A-Za-z0-9]{20,}
      | dapi[0-9a-f]{32}
      | ya29\.[A-Za-z0-9_-]{20,}
      | SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{10,}
      | (?:AKIA|ASIA)[A-Z0-9]{16,}
      | gh[opsur]_[A-Za-z0-9]{16,}
      | github_pat_[A-Za-z0-9_]{16,}
      | glpat-[A-Za-z0-9_-]{16,}
      | xox[abeprs]-[A-Za-z0-9-]{10,}
      | AIza[A-Za-z0-9_-]{30,}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+
    )
    | (?i:(?:\b|"""
    + _ESCAPED
    + r""")(?:bearer|basic)(?:\s|%20)+)
        (?:[A-Za-z._~+/=-]*[0-9][A-Za-z0-9._~+/=-]{5,}|[A-Za-z0-9._~+/=-]{20,})
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?s:.*?)(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE,
)
#: A user and password, or an access key, before the host of a URI. Escaped text can hold many beginnings in a word, so
#: that without a limit the search takes quadratic time.
_USER_INFO = re.compile(
    rf"(?i)(?P<scheme>(?:\b|{_ESCAPED})[a-z][a-z0-9+.-]{{0,30}}(?::|%3A)(?:\\?/|%2F){{2}})(?!\*{{3}}(?:@|%40))"
    r"(?P<user>[^/\s?#@]{1,2000}(?:/[^/\s?#@:]+)*)(?P<at>@|%40)(?=[^\s@])"
)
#: Parameters of a URI's query that hold a key.
_PARAMETER = re.compile(
    r"(?i)(?P<name>(?:[?&]|%3F|%26|\\u0026)"
    r"(?:[a-z0-9_-]{0,60}(?:secret|password|passwd|token|signature|(?:api|access|subscription)[_-]?key)"
    r"[a-z0-9_-]{0,60}|sig|key|auth)(?:=|%3D|\\u003d))(?!\*{3})(?P<value>[^&\s#'\"]+)"
)
#: What a header, a setting or a variable of such a name is given in a text: a value with a digit, or a long one.
_ASSIGNED = re.compile(
    r"(?i)(?P<name>(?:api[_-]?key|(?:access|account|subscription|secret)[_-]?key|(?:access|auth|api)[_-]?token|"
    r"secret|password|passwd|passphrase)(?:\\?[\"']|%2[27])?(?:\s|%20){0,2}(?:[:=]|%3[AD])(?:\s|%20){0,2}"
    r"(?:\\?[\"']|%2[27])?)"
    r"(?P<value>(?=[^\s\"'\\,;&]*[0-9])[^\s\"'\\,;&*<>{}()\[\]]{8,}|[A-Za-z_.~+/=-]{24,})"
)
#: Names of settings and variables that hold a key. Names of tokens of a vocabulary (`eos_token`) are not among them.
_NAMES = re.compile(
    r"(?:^|_)(?:api_?key|(?:access|account|subscription)_?key(?:_id)?|connection_string|secret|secret_?key|secret_access_key|private_?key|password|passwd|"
    r"passphrase|authorization|proxy_authorization|credentials?|bearer|client_secret|x_api_key|"
    r"(?:hf|hub|push_to_hub|hugging_?face(?:_hub)?|auth|access|api|bearer|session|security|refresh|id|secret|use_auth|"
    r"github|gh|gitlab|wandb|comet|slack|sas|private|tracking)_token)$|^(?:token|auth|cookie|cookies)$"
)
#: Names of variables in the environment, whose suffixes are less ambiguous than those of settings.
_VARIABLES = re.compile(
    r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|ACCESS_KEY_ID|AUTH|API_?KEY_?[A-Z0-9]+)$"
)
#: Shorter values of such variables ("1", "none") say nothing and are in every text.
_SHORTEST = 8


def looks_like_key(text: str) -> bool:
    """Whether a text contains a key, by its form, or a URI with one."""
    return (
        _FORMS.search(text) is not None
        or _PARAMETER.search(text) is not None
        or any(_holds_key(found) for found in _USER_INFO.finditer(text))
    )


def names_key(name: str) -> bool:
    """Whether a setting of this name holds a key (`api_key`, `hf_token`, `X-Api-Key`), never `eos_token`."""
    return bool(_NAMES.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()))


def names_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a key: OPENAI_API_KEY, HF_TOKEN, DB_PASSWORD."""
    return bool(_VARIABLES.search(name.upper())) or names_key(name)


def redact(text: str) -> str:
    """`text` without keys: those with the form of a key, those in URIs, and the values of the secret variables of this
    process's environment."""
    return _without(_values_of_environment(), text)


def _without(values: Sequence[str], text: str) -> str:
    for value in values:
        text = text.replace(value, REMOVED)
    text = _FORMS.sub(REMOVED, text)
    text = _ASSIGNED.sub(lambda m: m["name"] + REMOVED, text)
    text = _USER_INFO.sub(lambda m: f"{m['scheme']}{REMOVED}{m['at']}" if _holds_key(m) else m[0], text)
    return _PARAMETER.sub(lambda m: m["name"] + REMOVED, text)


def redacted(value: Any) -> Any:
    """A JSON value with every text in it redacted, the names of its members included."""
    return map_texts(functools.partial(_without, _values_of_environment()), value)


def map_texts(change: Callable[[str], str], value: Any) -> Any:
    """A JSON value with every text in it changed, the names of its members included. Tuples become lists."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k) if isinstance(k, str) else k: map_texts(change, v) for k, v in value.items()}
    return [map_texts(change, one) for one in value] if isinstance(value, list | tuple) else value


def secret_in(value: Any, where: str = "") -> str | None:
    """What is wrong with the first key in nested settings, with the remedy; None if there is none.

    The message names the setting and never shows its value.

    Args:
        where: path of the value, with dots.
    """
    for path, name, text in _texts(value, where, ""):
        if names_key(name):
            what = "is a key"
        elif isinstance(text, str) and looks_like_key(text):
            what = "contains what looks like a key"
        else:
            continue
        return f"{path} {what}, which config.yaml, manifest and logs would show; remove it and {_remedy(path)}"
    return None


def _texts(value: Any, path: str, name: str) -> Iterator[tuple[str, str, Any]]:
    """Path, own name and value of every leaf that can be a key: text and numbers; switches and nothing are none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _member(value=inner, key=str(key), path=path)
    elif isinstance(value, list | tuple | set | frozenset):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{i}" if path else str(i), name)
    elif value and isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, name, value


def _member(value: Any, key: str, path: str) -> Iterator[tuple[str, str, Any]]:
    if looks_like_key(key):
        yield f"{path}.{REMOVED}" if path else REMOVED, "", key
        return
    yield from _texts(value, f"{path}.{key}" if path else key, key)


def _remedy(path: str) -> str:
    last = path.rpartition(".")[2]
    if "endpoint" in path or "extra" in path or "authorization" in last.lower():
        return "set endpoint.api_key_env to the name of an environment variable that holds it on the nodes"
    if re.search(r"(?:hf|hub|hugging_?face\w*|^)_?token$", last) or last == "use_auth_token":
        return "set HF_TOKEN in the environment of every node"
    return (
        "set it in the environment of the nodes (endpoint.api_key_env names the variable of an endpoint; HF_TOKEN, "
        "WANDB_API_KEY and AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY are read by their libraries)"
    )


def _holds_key(found: re.Match[str]) -> bool:
    """Whether the part of a URI before the host is a key; Azure's container, a user name and a revision are none."""
    scheme, user = (urllib.parse.unquote(found[part].replace("\\/", "/")) for part in ("scheme", "user"))
    scheme = scheme.lower()
    first, slash, _ = user.partition("/")
    if ":" in first:  # user:password; a secret key of S3 may contain slashes, elsewhere a path has begun
        return not slash or scheme == "s3://"
    return not slash and (scheme in ("s3://", "http://", "https://") or bool(_FORMS.search(user)))


def _values_of_environment() -> list[str]:
    """Values of the secret variables of this process, the longest first, so that none is cut by another."""
    found = {
        value.strip() for name, value in os.environ.items() if _VARIABLES.search(name.upper()) and not _is_place(value)
    }
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def _is_place(value: str) -> bool:
    """Whether a variable names a file (SSH_AUTH_SOCK, GOOGLE_APPLICATION_CREDENTIALS), which messages may show."""
    return value.startswith(("/", "~", ".")) or os.path.exists(value)
