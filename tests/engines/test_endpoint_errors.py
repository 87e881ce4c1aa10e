"""What the refusals of several servers mean, in the words that they use."""

from __future__ import annotations

import datetime
import email.utils
import html
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.engines.base import EngineError, EngineStop, PromptTooLong
from ray_pipeline.engines.endpoint_errors import Again, Asked, Refused, clean, refusal, retry_after

JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.sampled_from(["error", "message", "code", "param", "detail", "loc", "metadata", "raw"]) | st.text()
ASKED = Asked({"temperature", "max_tokens", "response_format"}, True, 30, 20, 2048)


def error(message: str, **more: object) -> str:
    return json.dumps({"error": {"message": message, **more}})


@pytest.mark.parametrize(
    ("body", "figures"),
    [
        (  # OpenAI
            error(
                "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens. "
                "Please reduce the length of the messages.",
                code="context_length_exceeded",
                param="messages",
            ),
            (9001, 20, 8192),
        ),
        (
            error(
                "This model's maximum context length is 4097 tokens. However, you requested 4100 tokens (4000 in the "
                "messages, 100 in the completion). Please reduce the length of the messages or completion."
            ),
            (4000, 20, 4097),
        ),
        (  # vLLM
            error(
                "This model's maximum context length is 64 tokens. However, you requested 20 output tokens and your "
                "prompt contains 70 input tokens, for a total of 90 tokens. Please reduce the length of the input "
                "prompt or the number of requested output tokens.",
                param="input_tokens",
                code=400,
            ),
            (70, 20, 64),
        ),
        (  # vLLM, when a prompt is so long that it is not even tokenised: characters are not tokens
            error(
                "This model's maximum context length is 64 tokens. However, you requested 20 output tokens and your "
                "prompt contains 90000 characters (more than 1000 characters, which is the upper bound for 44 input "
                "tokens). Please reduce the length of the input prompt or the number of requested output tokens."
            ),
            (30, 20, 64),
        ),
        (  # llama.cpp
            error(
                "the request exceeds the available context size. try increasing the context size",
                type="exceed_context_size_error",
                n_prompt_tokens=5000,
                n_ctx=4096,
            ),
            (5000, 20, 4096),
        ),
        (  # TGI
            json.dumps(
                {
                    "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
                    "Given: 4000 `inputs` tokens and 512 `max_new_tokens`",
                    "error_type": "validation",
                }
            ),
            (4000, 20, 4096),
        ),
        (error("Prompt is too long", code=400), (30, 20, 2048)),  # no figures: what we know ourselves
    ],
)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_does_not_fit(status: int, body: str, figures: tuple[int, int, int]) -> None:
    found = refusal(status, {}, body, ASKED, None)
    assert isinstance(found, PromptTooLong)
    assert (found.prompt_tokens, found.max_tokens, found.limit) == figures


@pytest.mark.parametrize("digits", ["9" * 12, "9" * 5000])
def test_figures_that_no_prompt_has_are_left_out(digits: str) -> None:
    message = f"context length is {digits} tokens, your messages resulted in {digits} tokens"
    found = refusal(400, {}, error(message), ASKED, None)
    assert isinstance(found, PromptTooLong) and (found.prompt_tokens, found.limit) == (30, 2048)


@pytest.mark.parametrize("part", ["a", "prompt input ", "model ", "<style>", "<!--", "?token", "a+", "http://a/"])
def test_a_long_message_costs_no_time(part: str) -> None:
    """Some servers repeat the prompt, and an attacker may write what regular expressions are slow at."""
    text = part * (1_000_000 // len(part))
    begin = time.process_time()
    for body in (text, error(text)):
        assert len(str(refusal(400, {}, body, ASKED, None))) < 500
    assert time.process_time() - begin < 3  # minutes, were all of it searched


def test_a_server_that_does_not_say_its_limit() -> None:
    found = refusal(400, {}, error("input is too long"), Asked((), False, 30, 20), None)
    assert isinstance(found, PromptTooLong) and "does not fit the server's context" in str(found)


PAGE = "<html><head><title>413</title></head><body><center><h1>413 Request Entity Too Large</h1></center></body></html>"


@pytest.mark.parametrize(
    ("message", "figures"),
    [
        ("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).", (1200000, 1048576)),
        ("The input token count exceeds the maximum number of tokens allowed (1,048,576).", (40000, 1048576)),
        (
            "Unable to submit request because the input token count is 40123 but model only supports up to 32768. "
            "Reduce the input token count and try again.",
            (40123, 32768),
        ),
        (
            "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
            (140000, 131072),
        ),
        ("Prompt exceeds max length", (40000, 2048)),
        ("Prompt \u8d85\u957f", (40000, 2048)),
        ("<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 30720]", (40000, 30720)),
        (
            "Invalid request: Your request exceeded model token limit: 8192 (requested: 9001)",
            (9001, 8192),
        ),
        ("Invalid request: Your request exceeded model token limit: 8192", (40000, 8192)),
        (
            "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 5200. Try using a "
            "shorter prompt",
            (5200, 4081),
        ),
        (
            "too many tokens: size limit exceeded by 1234 tokens. Try using shorter or fewer inputs. The limit for "
            "this model is 128000 tokens.",
            (40000, 128000),
        ),
        ("prompt is too long: 208310 tokens > 200000 maximum", (208310, 200000)),
        (
            "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
            (40000, 32768),
        ),
        # In no server's words: two token counts, and the larger one can only be this prompt's.
        ("Sorry, 41,000 tokens are more than the 32,768 that I can hold", (41000, 32768)),
    ],
)
def test_a_prompt_that_does_not_fit_in_the_words_of_many_servers(message: str, figures: tuple[int, int]) -> None:
    asked = Asked({"max_tokens"}, False, 40000, 20, 2048)
    bodies = [
        error(message, code=400, status="INVALID_ARGUMENT"),
        f"[{error(message, code=400, status='INVALID_ARGUMENT')}]",
        json.dumps({"code": "InvalidParameter", "message": message, "request_id": "7"}),
        json.dumps({"detail": message}),
        json.dumps({"detail": [{"loc": ["body", "messages"], "msg": message}]}),
        json.dumps({"error": {"message": "Provider returned error", "metadata": {"raw": error(message)}}}),
        message,
        f"<html><body><p>{html.escape(message)}</p></body></html>",
    ]
    for body in bodies:
        found = refusal(400, {}, body, asked, None)
        assert isinstance(found, PromptTooLong), body
        assert (found.prompt_tokens, found.limit) == figures and message[:30].replace(",", "") in str(found).replace(
            ",", ""
        )


def test_a_limit_of_the_reply_is_not_the_prompts_fault() -> None:
    said = (
        "max_tokens is too large: 5000. This model supports at most 4096 completion tokens, whereas you provided 5000."
    )
    assert type(refusal(400, {}, error(said), Asked((), False, 30, 5000), None)) is EngineError
    assert type(refusal(400, {}, error(said), Asked((), False, 3000, 5000), None)) is EngineError


@pytest.mark.parametrize(
    ("body", "read"),
    [
        ('[{"error": {"code": 400, "message": "no such field", "status": "INVALID_ARGUMENT"}}]', "no such field"),
        ("upstream connect error", "upstream connect error"),
        (PAGE, "413 Request Entity Too Large"),
        ("<script>x()</script><b>Access &amp; denied</b>", "Access & denied"),
        (json.dumps({"detail": [{"loc": ["body", "n"], "msg": "too big"}, {"msg": "bad"}]}), "too big; bad"),
        (json.dumps({"errors": ["first", "second"]}), "first; second"),
        (json.dumps({"error": "plain"}), "plain"),
        (json.dumps({"Message": "of Bedrock"}), "of Bedrock"),
        (json.dumps({"error": {"error": {"message": "inside"}}}), "inside"),
        (json.dumps({"error": {"strange": 1}}), '{"error": {"strange": 1}}'),
        ('{"error": {"message": ["a", {"b": 1}]}}', "a"),
        ("", "no reason given"),
        ("null", "no reason given"),
        ("[" * 5000, "[[["),
        ("a < b and <c", "a < b and <c"),
    ],
)
def test_the_servers_own_words_are_the_reason(body: str, read: str) -> None:
    found = refusal(400, {}, body, ASKED, None)
    assert (
        isinstance(found, EngineError) and str(found).startswith(f"HTTP 400: {read}") and found.rejection == str(found)
    )


@given(body=st.text() | st.recursive(JSON, lambda v: st.lists(v) | st.dictionaries(KEYS, v)).map(json.dumps))
def test_any_body_is_read(body: str) -> None:
    for status in (400, 401, 403, 404, 413, 422, 429, 500, 503):
        assert isinstance(refusal(status, {}, body, ASKED, None), Exception)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, error("Incorrect API key provided: sk-ab***"), EngineStop),
        (402, error("Insufficient Balance"), EngineStop),
        (404, "404 page not found", EngineStop),
        (405, error("Method Not Allowed"), EngineStop),
        (301, "", EngineStop),
        (400, error("x", code="model_not_found"), EngineStop),
        (400, error("Model meta-llama/x is not available in this region"), EngineStop),
        (403, error("Your message was flagged"), EngineError),
        (400, error("The response was filtered", code="content_filter"), EngineError),
        (400, error("Conversation roles must alternate user/assistant"), EngineError),
        (422, json.dumps({"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}), EngineError),
        (429, error("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 90000"), EngineError),
        (413, "too big", PromptTooLong),
        (
            413,
            error("Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested 9000"),
            EngineError,
        ),
        (501, "not implemented", EngineError),
        (400, "[1]", EngineError),
        (400, '"x"', EngineError),
        (400, "", EngineError),
    ],
)
def test_whose_fault_a_refusal_is(status: int, body: str, kind: type[Exception]) -> None:
    assert type(refusal(status, {}, body, ASKED, None)) is kind


@pytest.mark.parametrize(
    ("status", "message", "blame"),
    [
        (
            429,  # mentions billing and payment, and is none the less over in a minute
            "Rate limit reached for gpt-4o on tokens per min. You can increase your rate limit by adding a payment "
            "method to your account at https://platform.openai.com/account/billing.",
            "limit",
        ),
        (500, "The server had an error", "call"),
        (408, "timeout", "call"),
        (503, "Overloaded", "endpoint"),
        (502, "Bad gateway", "endpoint"),
        (529, "overloaded_error", "endpoint"),
    ],
)
def test_what_passes(status: int, message: str, blame: str) -> None:
    found = refusal(status, {"retry-after": "7"}, error(message), ASKED, None)
    assert isinstance(found, Again) and (found.blame, found.wait) == (blame, 7.0)


@pytest.mark.parametrize(
    ("message", "param", "name"),
    [
        ("Unsupported value: 'temperature' does not support 0 with this model.", "temperature", "temperature"),
        ("Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'.", None, "max_tokens"),
        ("Unrecognized request argument supplied: 'temperature'", None, "temperature"),
        (
            "Invalid parameter: 'response_format' of type 'json_schema' is not supported",
            "response_format",
            "response_format",
        ),
        (
            "Invalid schema for response_format 'reply': 'maxLength' is not permitted.",
            "response_format",
            "response_format",
        ),
        ("Failed to compile the grammar", None, "response_format"),
        ("structured_outputs: Extra inputs are not permitted", None, "response_format"),
    ],
)
def test_a_parameter_that_is_not_taken(message: str, param: str | None, name: str) -> None:
    found = refusal(400, {}, error(message, param=param), ASKED, None)
    assert isinstance(found, Refused) and found.parameter == name


def test_what_was_not_asked_for_is_not_to_blame() -> None:
    plain = Asked({"temperature"}, False, 30, 20)
    for message in ("Invalid schema for response_format", "Unsupported parameter: 'tools'"):
        assert type(refusal(400, {}, error(message), plain, None)) is EngineError


def test_how_long_a_server_wants_to_be_left_alone() -> None:
    now = datetime.datetime.now(datetime.UTC)
    soon = retry_after({"retry-after": email.utils.format_datetime(now + datetime.timedelta(seconds=30), usegmt=True)})
    assert soon is not None and 25 < soon <= 30
    past = email.utils.format_datetime(now - datetime.timedelta(days=1), usegmt=True)
    assert retry_after({"retry-after": past}) == 0.0
    assert retry_after({"retry-after": "1.5"}) == 1.5 and retry_after({"retry-after": "-1"}) == 0.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert [retry_after({"retry-after": v}) for v in ("soon", "", "nan", "inf")] == [None] * 4
    for value in (f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", f"Mon, 01 Jan 2026 00:00:00 +{'9' * 15}", "9" * 5000):
        assert retry_after({"retry-after": value}) is None
    assert retry_after({}) is None


def test_keys_are_taken_out_of_what_servers_say() -> None:
    assert clean("key secret-1 is wrong, secret-1!", "secret-1") == "key *** is wrong, ***!"
    assert clean("Incorrect key sk-ab***wxyz; gsk_0123456789 too", None) == "Incorrect key ***; *** too"
    assert clean("sent Bearer abc.def", None) == "sent ***"
    assert clean("a  \n b", None) == "a b" and len(clean("x" * 9999, None)) < 400
    assert clean("the risk-taking ask-me task", None) == "the risk-taking ask-me task"
