"""Models without a system role: found out by rendering, or by a server's words, and the text goes to the user turn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ray_pipeline.engines import endpoint_retry
from ray_pipeline.engines.base import EngineError, EngineStartError, Message, Sampling
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.openai import OpenAIEngine
from ray_pipeline.engines.system_role import refuses_system, without_system
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import call_key, prompt_id
from tests.endpoint import KEY, Answer, Endpoint, refused, said, using
from tests.engines.test_openai_engine import COLD, SCORE, engine_at
from tests.models import CHAT_TEMPLATE, PLAIN_TEMPLATE, make_tokenizer
from tests.scripted import logged_calls


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setattr(endpoint_retry, "_BACKOFF_SECONDS", 0.01)


def chat(*turns: str) -> list[Message]:
    """Messages from turns such as `system: Be brief`."""
    return [{"role": role, "content": text} for role, text in (turn.split(": ", 1) for turn in turns)]


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "folded"),
    [
        (chat("system: a", "user: b"), chat("user: a\n\nb")),
        (chat("user: b"), chat("user: b")),
        (chat("system: a", "user: b", "assistant: c", "user: d"), chat("user: a\n\nb", "assistant: c", "user: d")),
        (chat("system: a", "system: b", "user: c"), chat("user: a\n\nb\n\nc")),
        (
            chat("user: a", "assistant: b", "system: c", "user: d"),
            chat("user: a", "assistant: b", "user: c\n\nd"),
        ),
        (chat("system: a", "assistant: b", "user: c"), chat("assistant: b", "user: a\n\nc")),
        (chat("user: a", "system: b"), chat("user: a\n\nb")),
        (chat("system: a"), chat("user: a")),
        (chat("system: ", "user: b"), chat("user: b")),
    ],
)
def test_system_text_is_at_the_head_of_the_user_turn(messages: list[Message], folded: list[Message]) -> None:
    assert without_system(messages) == folded


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(min_size=1))))
def test_no_text_is_lost_and_no_turn_is_added(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    before = json.dumps(messages)
    folded = without_system(messages)
    assert json.dumps(messages) == before and without_system(folded) == folded
    assert all(any(text in message["content"] for message in folded) for _, text in turns)
    assert "system" not in {m["role"] for m in folded}
    others = [role for role, _ in turns if role != "system"]
    assert [m["role"] for m in folded][: len(others)] == others and len(folded) <= len(others) + 1


# --- chat templates ---------------------------------------------------------------------------------------------------

#: The templates of Gemma 2 and Mistral 7B Instruct v0.2, shortened; the next two drop the system text or the user's.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }} {% endif %}{% endfor %}"
)
DROPS_USER = "Q: {{ messages[0]['content'] }} A:"


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, DROPS_SYSTEM, DROPS_USER], ids=["gemma", "mistral", "1", "2"])
def test_a_template_without_the_role_gets_the_text_in_the_user_turn(template: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    chats = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path), template)
    assert not chats.has_system
    asked, folded = chat("system: Be brief<|im_end|>.", "user: Why?"), chat("user: Be brief<|im_end|>.\n\nWhy?")
    assert chats.text(asked) == chats.text(folded) and "Be brief<|im_end|>.\n\nWhy?" in chats.text(asked)
    assert chats.token_ids(asked) == chats.token_ids(folded)


def test_a_template_with_the_role_is_left_alone(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    shouts = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper | trim }}{% endfor %}"
    for template in (CHAT_TEMPLATE, PLAIN_TEMPLATE, shouts):
        chats = ChatTemplate(tokenizer, template)
        assert chats.has_system and "system" in chats.text(chat("system: Be brief.", "user: Why?"))
    # A template that renders nothing fails for another reason, which the user shall read.
    broken = ChatTemplate(tokenizer, "{{ raise_exception('no chats here') }}")
    assert broken.has_system
    with pytest.raises(Exception, match="no chats here"):
        broken.token_ids(chat("system: Be brief.", "user: Why?"))


# --- endpoints --------------------------------------------------------------------------------------------------------

GEMINI = {"error": {"code": 400, "message": "Developer instruction is not enabled for models/gemma-3-27b-it"}}
RAISED = "Conversation roles must alternate user/assistant/user/assistant/..."

REFUSALS = {
    "vLLM": Answer(400, {"object": "error", "message": "System role not supported", "type": "BadRequestError"}),
    "TGI": Answer(422, {"error": "Template error: invalid operation: System role not supported (in <string>:1)"}),
    "llama.cpp": refused(500, "Jinja Exception: System role not supported"),
    "SGLang": Answer(500, b"jinja2.exceptions.TemplateError: System role not supported"),
    "Gemini": Answer(400, [GEMINI]),
    "OpenRouter": Answer(
        400, {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps(GEMINI, indent=1)}}}
    ),
    "a gateway": Answer(200, GEMINI),
    "OpenAI": refused(
        400,
        "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
        "unsupported_value",
        "messages[0].role",
    ),
    "Bedrock": Answer(
        400,
        {
            "message": "This model doesn't support system messages. Try again without a system message or use a model "
            "that supports system messages."
        },
    ),
    "Anthropic": refused(400, "role 'system' is not supported on this model"),
    "Anthropic's messages": refused(400, 'messages: Unexpected role "system". The Messages API accepts a top-level x'),
    "Mistral": refused(400, RAISED),
    "LM Studio": refused(
        400, "Error rendering prompt with jinja template: Only user and assistant roles are supported!"
    ),
    "Vertex": Answer(400, [{"error": {"message": "Please use a valid role: user, model.", "code": 400}}]),
    "Bedrock's turns": refused(400, "A conversation must start with a user message. Try again."),
    "ERNIE": refused(400, "messages\u4e2drole\u4e0d\u80fd\u4e3asystem"),
    "in prose": Answer(400, b"system role is not supported"),
    "a validator": Answer(422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Invalid role: system"}]}),
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_refuses_the_role_gets_the_text_in_the_user_turn(answer: Answer, tmp_path: Path) -> None:
    asked = chat("system: Be brief.", "user: Why?")

    async def run(engine: OpenAIEngine) -> list[Any]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1) as log:
            replies = [await log.bound(prompt_id(asked), "judge").chat(asked, COLD)]
            others = [chat("system: Be brief.", f"user: Why {i}?") for i in range(3)]
            return replies + [await log.bound(prompt_id(asked), "judge").chat(other, COLD) for other in others]

    with Endpoint(lambda body, n: answer if "system" in roles(body) else said("Because.")) as server:
        engine = engine_at(server.url)
        assert [reply.text for reply in using(engine, run)] == ["Because."] * 4
        # Repeated at once, and later calls are not refused any more.
        assert [roles(body) for body in server.asked] == [["system", "user"]] + [["user"]] * 4
        assert server.asked[1]["messages"] == [{"role": "user", "content": "Be brief.\n\nWhy?"}]
        [note] = engine.notes
        assert "rejects system messages" in note and "user turn" in note and server.url in note

        # The key is of the messages as asked, so that a second pass asks nobody.
        [row] = [row for row in logged_calls(Folder(str(tmp_path))).to_pylist() if row["messages"] == asked]
        assert row["call_key"] == call_key(engine.identity, asked, COLD.key())
        assert [reply.text for reply in using(engine_at(server.url), run)] == ["Because."] * 4
        assert len(server.asked) == 5


def roles(body: dict[str, Any]) -> list[str]:
    return [message["role"] for message in body["messages"]]


@pytest.mark.parametrize(
    "message",
    [
        "The system prompt was flagged by our content policy and is not allowed",
        "This model's maximum context length is 64 tokens; longer system messages are not supported",
        "System overloaded",
        "The operating system does not support this",
        "System message contains invalid characters",
        "Invalid value: 'messages[1].content' must be a string",
        "After the optional system message, conversation roles must alternate user/assistant/user/assistant/...",
        "This model does not support response_format; the system fingerprint is fp_1",
    ],
)
def test_other_refusals_are_not_about_the_role(message: str) -> None:
    with Endpoint(lambda body, n: refused(400, message)) as server:
        engine = engine_at(server.url)
        [error] = asked_of(engine, chat("system: a", "user: b"))
    assert isinstance(error, EngineError) and "user turn" not in "".join(engine.notes)
    assert {tuple(roles(body)) for body in server.asked} == {("system", "user")}


def test_turns_that_do_not_alternate_without_the_role_are_the_rows_own_fault() -> None:
    assert refuses_system(RAISED, ["system", "user"])
    assert not refuses_system(RAISED, ["user", "user"])
    assert not refuses_system(RAISED, ["system", "user", "user"])
    assert not refuses_system("System role not supported", ["user"])


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("Role 'system' is invalid", True),
        ("Input should be 'user' or 'assistant'", True),  # pydantic 2
        ("unexpected value; permitted: 'user', 'assistant'", True),  # pydantic 1
        ("role must be one of: user, assistant", True),
        ("Please use a valid role: user, model.", True),
        ("Input should be 'system', 'user' or 'assistant'", False),
        ("role must be one of user, assistant, system", False),
        ("Input should be 'user', 'assistant', 'system' or 'tool'", False),
        ("last message must be from user", False),
        ("role 'tool' is invalid", False),
    ],
)
def test_a_list_of_roles_without_system_refuses_it(words: str, refused: bool) -> None:
    assert refuses_system(words, ["system", "user"]) is refused


def asked_of(engine: OpenAIEngine, *chats: list[Message], sampling: Sampling = COLD) -> list[Any]:
    return using(
        engine, lambda e: asyncio.gather(*(e.chat(messages, sampling) for messages in chats), return_exceptions=True)
    )


def test_many_calls_at_once_are_adapted_and_noted_once() -> None:
    slow = Answer(**{**vars(refused(400, "System role not supported")), "delay": 0.1})
    with Endpoint(lambda body, n: slow if "system" in roles(body) else said()) as server:
        engine = engine_at(server.url, concurrency=8)
        replies = asked_of(engine, *(chat("system: a", f"user: {i}") for i in range(20)))
    assert [reply.text for reply in replies] == ["ok"] * 20 and len(engine.notes) == 1
    assert len(server.asked) == 20 + 8


@pytest.mark.parametrize("words", ["System role not supported", "nope"])
def test_the_short_call_at_the_start_finds_it_out(words: str) -> None:
    """In words that nobody has foreseen, too, and together with structured output that is refused."""

    def script(body: dict[str, Any], n: int) -> Answer:
        return refused(400, words) if "system" in roles(body) else said('{"verdict": "green"}')

    asked = chat("system: a", "user: b")
    with Endpoint(script) as server:
        engine = engine_at(server.url, canary=True)
        [reply] = asked_of(engine, asked, sampling=Sampling(grammar=SCORE))
        assert reply.text == '{"verdict": "green"}' and server.asked[-1]["messages"] == chat("user: a\n\nb")
        assert "response_format" in server.asked[-1] and len(engine.notes) == 1 and words in engine.notes[0]

        plain = lambda body, n: refused(400, words) if "response_format" in body else script(body, n)  # noqa: E731
        server.script = plain
        engine = engine_at(server.url, canary=True)
        [reply] = asked_of(engine, asked, sampling=Sampling(grammar=SCORE))
        assert roles(server.asked[-1]) == ["user"] and "response_format" not in server.asked[-1]
        assert "are requested as text" in "".join(engine.notes) and "user turn" in "".join(engine.notes)

        server.script = lambda body, n: refused(400, "never")
        with pytest.raises(EngineStartError, match=r"never.*chat template"):
            using(engine_at(server.url, canary=True), lambda e: e.start())
