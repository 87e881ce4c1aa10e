"""The policy's tokenizer, prepared alike for every method, and checked: a policy must be able to learn from its chat
template where a reply starts and ends."""

from __future__ import annotations

import functools
import re
from typing import Any

from ray_pipeline.engines.chat_template import QUESTION, REPLY, end_token, render
from ray_pipeline.engines.thoughts import opens_thought
from ray_pipeline.training.methods import TrainingInputError, method_of
from ray_pipeline.training.spec import TrainSpec


def load_tokenizer(spec: TrainSpec) -> Any:
    """The tokenizer of the base. One without a padding token pads with EOS, as TRL does in only three of its trainers:
    every trainer masks padding by position, so that the EOS of an answer is still learned.

    Raises:
        TrainingInputError: no tokenizer, no chat template, or one from which a policy cannot learn where a reply starts
            and ends.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise TrainingInputError(f"model: cannot load the tokenizer of {spec.model}: {error}") from error
    if not tokenizer.chat_template:
        raise TrainingInputError(
            f"model: the tokenizer of {spec.model} has no chat template, but the rows are chats; use an instruct "
            "model or save a template with its tokenizer"
        )
    end = _check_template(spec, tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def complete_generation_config(config: Any, tokenizer: Any, end: int | None) -> None:
    """Make the generation config of a base that of its policy: generation stops at the end of a reply, and settings
    that transformers reads but refuses to write are repaired.

    Args:
        config: a transformers.GenerationConfig; changed in place.
        end: `end_token` of the chat template.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in ends if token is not None]
    if end is not None and end not in ends:
        ends.append(end)
        config.eos_token_id = ends if len(ends) > 1 else end
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        try:
            config.validate(strict=True)
        except ValueError:  # a temperature, say: its author meant sampling
            config.do_sample = True


def _check_template(spec: TrainSpec, tokenizer: Any) -> int | None:
    template = f"model: the chat template of {spec.model}"
    remedy = "correct it in the model's folder (chat_template.jinja)"
    try:
        end = end_token(tokenizer, spec.chat_template_args)
        chat = functools.partial(render, tokenizer, arguments=spec.chat_template_args)
        prompt, same = (chat([QUESTION], generation_prompt=start) for start in (True, False))
        whole = chat([QUESTION, REPLY], generation_prompt=False)
    except Exception as error:  # of the template's own
        raise TrainingInputError(f"{template} cannot render a question and its reply ({error}); {remedy}") from error
    if REPLY["content"] not in whole:
        raise TrainingInputError(f"{template} leaves out the reply of the assistant; {remedy}")
    before = whole[: whole.rindex(REPLY["content"])]
    shared = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), len(before))
    lost = prompt[shared:].strip()
    if prompt != same and lost:
        raise TrainingInputError(
            f"{template} writes {lost!r} where it asks for a reply, and leaves it out before a finished one"
            f"{' (it drops the thoughts of replies)' if opens_thought(prompt) else ''}: the policy would be trained on "
            f"other prompts than the engine sends; {remedy}, so that both have it or neither has"
        )
    header = before.removeprefix(prompt)
    header = re.sub("<think>.*</think>", "", header, flags=re.DOTALL).strip()
    if prompt == same and header:
        raise TrainingInputError(
            f"{template} has no generation prompt (add_generation_prompt changes nothing): the policy would have to "
            f"write {header!r} before each reply; {remedy}"
        )
    if end is None and (tokenizer.eos_token is None or not method_of(spec.settings.method).adds_ends):
        raise TrainingInputError(
            f"{template} puts no special token behind a reply, so that the policy could not learn to stop; {remedy}, "
            "for example with {{ eos_token }}"
        )
    return end
