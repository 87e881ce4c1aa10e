"""Keys never pass: refused in settings, removed from messages, logs and stored failures."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.config.loading import read_config, read_yaml
from ray_pipeline.config.messages import ConfigError, explain
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.endpoint_errors import clean
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.failures import failed_again
from ray_pipeline.graph.json_log import JsonLines
from ray_pipeline.graph.log import _Lines
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.secrets import REMOVED, looks_like_key, names_key, redact, redacted, secret_in
from ray_pipeline.training.spec import TrainSettings
from ray_pipeline.workflow.registry import find_workflow

_WORD = string.ascii_letters + string.digits


def drawn(prefix: str, size: int, alphabet: str = _WORD) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=size, max_size=size + 20).map(lambda tail: prefix + tail)


#: Keys as their makers form them.
KEYS = st.one_of(
    *(drawn(prefix, 20) for prefix in ("sk-", "sk-proj-", "sk-ant-api03-", "hf_", "gsk_", "xai-", "ghp_", "gho_")),
    *(drawn(prefix, 26) for prefix in ("nvapi-", "pplx-", "csk-", "tgp_v1_", "wandb_v1_", "fw_", "npm_", "ya29.")),
    drawn("dapi", 32, "0123456789abcdef").map(lambda key: key[:36]),
    drawn("github_pat_", 22),
    drawn("glpat-", 20),
    drawn("AKIA", 16, string.ascii_uppercase + string.digits),
    drawn("ASIA", 16, string.ascii_uppercase + string.digits),
    drawn("AIza", 35),
    drawn("Bearer ", 24),
    drawn("bearer ", 24),
)
_TEXT = st.text(st.characters(exclude_categories=("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Mn")), max_size=20)


@given(KEYS, _TEXT, _TEXT)
def test_a_key_passes_no_door_of_text(key: str, before: str, after: str) -> None:
    bare = key.split()[-1]
    text = f"{before} {key} {after}"
    record = logging.LogRecord("quorum", logging.INFO, __file__, 1, "%s", (text,), None)
    record.data = {"note": [text], key: 1}
    for passed in (
        redact(text),
        json.dumps(redacted({"a": [{"b": text}], key: text}), ensure_ascii=False),
        _Lines("%(message)s").format(record),
        JsonLines("run").format(record),
        clean(text, None),
        failed_again(None, 0, text, 3).error,
        redact(f"s3://{bare}@bucket/run and https://user:{bare}@host/x?token={bare}&a=1"),
    ):
        assert bare not in passed
        assert not looks_like_key(passed)
        assert redact(passed) == passed


@given(KEYS | st.text(_WORD, min_size=8).map(lambda word: f"{word}1"), st.sampled_from(["https", "s3", "postgres"]))
def test_a_key_in_escaped_text_is_removed(key: str, scheme: str) -> None:
    """As in the query of a URI, or in JSON of writers that escape `/` and `&`."""
    bare = key.split()[-1]
    uri = f"{scheme}://user:{bare}@host/x?token={bare}&a=1"
    called = [f"api_key={bare}", f'{{"api_key": "{bare}"}}', f"Bearer 0{bare}", f"?a=1&sig={bare}"]
    escapes: list[Callable[[str], str]] = [
        lambda text: quote(text, safe=""),
        lambda text: f"x={quote(text)}",
        lambda text: text.replace("/", "\\/").replace("&", "\\u0026").replace('"', '\\"'),
        lambda text: f"{{\\n{text}",
    ]
    for escape in escapes:
        for text in (uri, *called):
            assert bare not in redact(escape(text))
            assert redact(redact(escape(text))) == redact(escape(text))
    assert redact(quote(f"{scheme}://user:{bare}@host", safe="")) == f"{scheme}%3A%2F%2F{REMOVED}%40host"


@given(KEYS, st.sampled_from(["a", "0.b", "chat_template_kwargs.deep", "list.0"]))
def test_a_key_in_a_setting_is_refused_and_not_repeated(key: str, path: str) -> None:
    value: Any = {"x": key}
    for step in reversed(path.split(".")):
        value = [value] if step.isdigit() else {step: value}
    problem = secret_in(value)
    assert problem is not None and key.split()[-1] not in problem and "environment" in problem


@given(st.text(string.ascii_letters + " .,:/_-@?=&'\n", max_size=200))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "a task-specific and risk-averse disk-usage note, sk-learn",
        "The bearer of this letter, Bearer tokens, basic arithmetic",
        "hf_overrides hf_transfer ghp_ AKIA s3://bucket/a@b.csv hf://datasets/owner/name@main/x.parquet",
        "abfs://container@account.dfs.core.windows.net/x gs://anonymous@bucket/x ssh://git@host/x user@example.org",
        "http://host:8265/path/a@b?region=eu",
        r"https%3A%2F%2Fhost%3A8265%2Fpath%2Fa%40b https:\/\/host\/a@b https://host/a%40b C:\new\task-notes",
        "api_key_env: OPENAI_API_KEY, endpoint.api_key_env=NAME_2_OF_THE_VARIABLE, the API key: it is missing",
        "password: wrong; secret = none, the secret: nobody tells it, access key=*** fw_pass npm_config",
    ],
)
def test_other_texts_pass_as_they_are(text: str) -> None:
    assert redact(text) == text and not looks_like_key(text)


def test_the_value_of_a_secret_variable_is_removed_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVER_API_KEY", "plainwordsonly")
    monkeypatch.setenv("MY_API_KEY_EU", "words-of-europe")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/some/file.json")
    monkeypatch.setenv("SHORT_TOKEN", "none")
    assert redact("got plainwordsonly of /etc/some/file.json, none") == f"got {REMOVED} of /etc/some/file.json, none"
    assert redact("no words-of-europe") == f"no {REMOVED}"


@pytest.mark.parametrize(
    "text",
    ["x-api-key: {}", "api-key:{}", '{{"api_key": "{}", "n": 1}}', "{{'apiKey': '{}'}}",
     "OPENAI_API_KEY={} python x.py", "password={};Database=d", "AccountName=n;AccountKey={}",
     '{{\\"api_key\\": \\"{}\\"}}',
     "https://h?subscription-key={}"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["0123456789abcdef0123456789abcdef", "hunter2hunter2", "Zm9vYmFyYmF6c3BhbWVnZ3M="])
def test_what_a_text_gives_the_name_of_a_key_is_removed(text: str, key: str) -> None:
    assert redact(text.format(key)) == text.format(REMOVED) == redact(redact(text.format(key)))


@pytest.mark.parametrize("name", ["Ocp-Apim-Subscription-Key", "account_key", "sas_token", "connection_string",
                                  "mlflow_tracking_token", "private-token", "api_key", "apiKey", "X-Api-Key",
                                  "hf_token", "hub_token", "token", "password",
                                  "Authorization", "aws_secret_access_key", "push_to_hub_token"])  # fmt: skip
def test_settings_that_hold_keys_are_known_by_their_names(name: str) -> None:
    assert names_key(name)


@pytest.mark.parametrize("name", ["max_tokens", "eos_token", "pad_token", "stop_token_ids", "api_key_env", "tokenizer",
                                  "key", "image_token", "hub_private_repo", "logprob_token_ids"])  # fmt: skip
def test_settings_of_other_tokens_are_none(name: str) -> None:
    assert not names_key(name)


ENDPOINT = {"base_url": "https://api.example.org/v1"}


@pytest.mark.parametrize(
    ("kind", "values", "place"),
    [
        (ModelSettings, {"model": "m", "engine": "openai", "endpoint": {**ENDPOINT, "extra_body": {"api_key": "x"}}},
         "extra_body.api_key"),
        (ModelSettings, {"model": "m", "engine": "openai",
                         "endpoint": {**ENDPOINT, "extra_body": {"a": {"headers": {"Authorization": "plain-secret"}}}}},
         "Authorization"),
        (ModelSettings, {"model": "m", "args": {"hf_token": "plain-secret"}}, "args.hf_token"),
        (TrainSettings, {"trainer_args": {"hub_token": "plain-secret"}}, "trainer_args.hub_token"),
    ],
)  # fmt: skip
def test_settings_with_keys_name_the_setting_and_the_remedy(kind: type[Settings], values: Any, place: str) -> None:
    with pytest.raises(ValidationError) as refused:
        kind(**values)
    message = explain(refused.value, kind, "file.yaml")
    assert "plain-secret" not in str(refused.value)
    assert place in message and "environment" in message and "plain-secret" not in message


@pytest.mark.parametrize("place", ["s3://KEYID:plain-secret@bucket/m", "s3://plain-secret@bucket/m",
                                   "https://host.org/m?sig=plain-secret", "hf_abcdefghijklmnopqrst"])  # fmt: skip
def test_a_key_anywhere_in_a_file_is_refused(place: str) -> None:
    values = read_yaml("pocket")
    values["models"]["judge"]["model"] = place
    with pytest.raises(ConfigError, match=r"my.yaml: models\.judge\.model contains what looks like a key") as refused:
        read_config(find_workflow("dmapo").config, values, (), "my.yaml")
    assert "plain-secret" not in str(refused.value) and "abcdefghij" not in str(refused.value)


def test_a_wrong_value_that_is_a_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(find_workflow("dmapo").config, {}, ["gate.tau=sk-0123456789abcdef"])
    assert "0123456789" not in str(refused.value) and "gate.tau" in str(refused.value)


@pytest.mark.parametrize("uri", ["s3://AKIAABCDEFGHIJKLMNOP@bucket/run", "s3://plainsecret@bucket/run",
                                 "s3://a:b/c+d@bucket/run", "s3://bucket/run?session_token=plainsecret"])  # fmt: skip
def test_a_location_with_a_key_is_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="environment") as refused:
        Folder(uri)
    assert "plainsecret" not in str(refused.value) and "AKIA" not in str(refused.value)


def test_an_ordinary_location_is_none(tmp_path: Path) -> None:
    Folder(str(tmp_path / "user@host"))
    assert Folder("s3://bucket/run?region=eu-central-1").location == "s3://bucket/run?region=eu-central-1"
