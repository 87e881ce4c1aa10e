"""Judge prompts of the public benchmarks, as data: loaded when they are used, from the files that publish them.

The published texts are not part of this project, and are sent as they are: their wording is the protocol, though an
answer can close the marks that it stands between. The project's own wording of the same prompts is in
`configs/prompts/mt_bench` and `configs/prompts/alpaca_eval`; which one a score was made with is in its protocol
(`prompts_digest`).
"""

from __future__ import annotations

import importlib.resources
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from ray_pipeline.agents.templates import TemplateError, fence
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Message
from ray_pipeline.store.keys import digest

#: Name of each MT-Bench prompt → the fields that it must use.
MT_BENCH_FIELDS: Mapping[str, frozenset[str]] = {
    "single-v1": frozenset({"question", "answer"}),
    "single-math-v1": frozenset({"question", "answer", "ref_answer_1"}),
    "single-v1-multi-turn": frozenset({"question_1", "answer_1", "question_2", "answer_2"}),
    "single-math-v1-multi-turn": frozenset(
        {"question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"}
    ),
    "pair-v2": frozenset({"question", "answer_a", "answer_b"}),
    "pair-math-v1": frozenset({"question", "answer_a", "answer_b", "ref_answer_1"}),
    "pair-v2-multi-turn": frozenset(
        {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
    ),
    "pair-math-v1-multi-turn": frozenset(
        {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
        | {"ref_answer_1", "ref_answer_2"}
    ),
}
_OUTPUT = {"single": "[[rating]]", "pairwise": "[[A]]"}

#: A word for the tags around texts, made from the question. Own prompts use it as often as they like; published ones
#: do not know it.
_FENCE = "fence"

#: What the AlpacaEval prompt must use. The judge answers with the label of the better output.
PREFERENCE_FIELDS = frozenset({"instruction", "output_1", "output_2"})


class BenchPrompt(Settings):
    """One prompt of MT-Bench in the published form: a system text and a user text with `{fields}`."""

    name: str
    type: Literal["single", "pairwise"]
    system_prompt: str = ""
    prompt_template: str
    output_format: str
    description: str = ""
    category: str = ""

    def messages(self, fields: Mapping[str, str]) -> list[Message]:
        """The messages of one call; `{…}` inside a field's text is text."""
        asked = [text for name, text in sorted(fields.items()) if name.startswith("question")]
        word = fence(asked, list(fields.values()))
        user: Message = {"role": "user", "content": self.prompt_template.format_map({**fields, _FENCE: word})}
        return [*([{"role": "system", "content": self.system_prompt}] if self.system_prompt else []), user]


class PreferencePrompt(Settings):
    """The prompt of AlpacaEval: messages with `{instruction}`, `{output_1}`, `{output_2}`, and the labels that the
    judge may answer: of the output shown first and of the second."""

    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    labels: tuple[str, str] = ("m", "M")

    def filled(self, instruction: str, first: str, second: str) -> list[Message]:
        """The messages of one call; `{…}` inside a text is text."""
        values = {"instruction": instruction, "output_1": first, "output_2": second}
        values[_FENCE] = fence([instruction], list(values.values()))
        return [{"role": m["role"], "content": _fill(m["content"], values)} for m in self.messages]


def mt_bench_prompts(rows: Sequence[Mapping[str, Any]], source: str) -> dict[str, BenchPrompt]:
    """MT-Bench's prompts by name, from rows of the published file (FastChat: llm_judge/data/judge_prompts.jsonl).

    Raises:
        TemplateError: one of the eight is missing, occurs twice, requests another output format, or uses other fields.
    """
    found: dict[str, BenchPrompt] = {}
    for row in rows:
        if row.get("name") not in MT_BENCH_FIELDS:
            continue  # The published file has prompts of other modes in some versions.
        try:
            prompt = BenchPrompt.model_validate(dict(row))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
            raise TemplateError(f"{source}, prompt {row.get('name')}: {problems}") from error
        if prompt.name in found:
            raise TemplateError(f"{source}: prompt {prompt.name} comes twice")
        if prompt.output_format != _OUTPUT[prompt.type] or not prompt.name.startswith(prompt.type[:4]):
            raise TemplateError(
                f"{source}, prompt {prompt.name}: {prompt.type} prompts of that name ask for {_OUTPUT[prompt.type]}"
            )
        _same_fields(f"{source}, prompt {prompt.name}", _fields(prompt.prompt_template), MT_BENCH_FIELDS[prompt.name])
        found[prompt.name] = prompt
    if lacking := sorted(MT_BENCH_FIELDS.keys() - found.keys()):
        raise TemplateError(f"{source}: no prompt named {', '.join(lacking)}")
    return found


def own_mt_bench_prompts() -> dict[str, BenchPrompt]:
    """The project's own wording of MT-Bench's prompts."""
    text = (importlib.resources.files("configs") / "prompts" / "mt_bench" / "default.yaml").read_text("utf-8")
    return mt_bench_prompts(yaml.safe_load(text), "configs/prompts/mt_bench/default.yaml")


def preference_prompt(text: str, source: str, labels: tuple[str, str] = ("m", "M")) -> PreferencePrompt:
    """An AlpacaEval prompt from a published file: ChatML text (`<|im_start|>role … <|im_end|>`), or one user message.

    The text is split into messages before anything is filled in, so that an output cannot start a new message.

    Raises:
        TemplateError: a message has no role or no end, or the fields are not `PREFERENCE_FIELDS`, each used once.
    """
    text = text.strip()
    if text.startswith("<|im_start|>"):
        messages: list[dict[str, str]] = []
        for part in text.split("<|im_start|>")[1:]:
            role, _, content = part.partition("\n")
            body, end, _ = content.partition("<|im_end|>")
            if not end or role.strip() not in ("system", "user", "assistant"):
                raise TemplateError(f"{source}: message {len(messages) + 1} has no role or no <|im_end|>")
            messages.append({"role": role.strip(), "content": body.strip()})
    else:
        messages = [{"role": "user", "content": text}]
    used = [name for m in messages for name in _FIELD.findall(m["content"]) if name != _FENCE]
    if len(used) > len(set(used)):
        raise TemplateError(f"{source}: a field is used twice")
    _same_fields(source, frozenset(used), PREFERENCE_FIELDS)
    return PreferencePrompt(messages=tuple(messages), labels=labels)


def own_preference_prompt() -> PreferencePrompt:
    """The project's own wording of the pairwise prompt."""
    text = (importlib.resources.files("configs") / "prompts" / "alpaca_eval" / "default.yaml").read_text("utf-8")
    return PreferencePrompt.model_validate(yaml.safe_load(text))


def prompts_digest(prompts: Mapping[str, BenchPrompt] | PreferencePrompt, kind: str = "") -> str:
    """Digest of what is sent, for the protocol: not of names and descriptions.

    Args:
        kind: of MT-Bench's prompts only those of this type ("single", "pairwise"); empty: all.
    """
    if isinstance(prompts, PreferencePrompt):
        return digest([[dict(m) for m in prompts.messages], list(prompts.labels)])
    used = {name: p for name, p in prompts.items() if not kind or p.type == kind}
    return digest({name: [p.system_prompt, p.prompt_template] for name, p in used.items()})


_FIELD = re.compile(r"\{(instruction|output_1|output_2|fence)\}")


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda match: values[match[1]], text)


def _fields(template: str) -> frozenset[str]:
    try:
        return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    except ValueError as error:
        raise TemplateError(f"not a text with {{fields}}: {error}") from error


def _same_fields(where: str, used: frozenset[str], needed: frozenset[str]) -> None:
    used -= {_FENCE}
    if used != needed:
        lacking, unknown = sorted(needed - used), sorted(used - needed)
        raise TemplateError(
            f"{where}: "
            + "; ".join(
                [f"does not use {{{', '.join(lacking)}}}"] * bool(lacking)
                + [f"uses {{{', '.join(unknown)}}}, which it does not have"] * bool(unknown)
            )
        )
