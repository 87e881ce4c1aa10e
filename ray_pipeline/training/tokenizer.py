"""The policy's tokenizer, prepared alike for every method, and the token that ends a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_pipeline.engines.base import Message
from ray_pipeline.engines.system_role import renders_system, without_system
from ray_pipeline.training.methods import TrainingInputError, method_of
from ray_pipeline.training.spec import TrainSpec

_ANSWER = "Quorum7"  # no template changes it
_USER = {"role": "user", "content": "Hello"}


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


def end_token(tokenizer: Any, template_args: Mapping[str, Any]) -> int | None:
    """Id of the special token that the chat template puts behind a reply; None if it puts none."""
    whole = _render(tokenizer, template_args, [_USER, {"role": "assistant", "content": _ANSWER}], False)
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    after = tokenizer(whole.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in special), None)


def folding(tokenizer: Any, template_args: Mapping[str, Any]) -> Callable[[Sequence[Message]], list[Message]] | None:
    """What an engine does to prompts before rendering them: where the chat template has no system role, system text
    goes into the user turn; None: nothing."""
    has_system = renders_system(lambda chat: _render(tokenizer, template_args, chat, True))
    return None if has_system else without_system


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
        args = tokenizer, spec.chat_template_args
        prompt, same = (_render(*args, [_USER], start) for start in (True, False))
        whole = _render(*args, [_USER, {"role": "assistant", "content": _ANSWER}], False)
    except Exception as error:  # of the template's own
        raise TrainingInputError(f"{template} cannot render a question and its reply ({error}); {remedy}") from error
    if _ANSWER not in whole:
        raise TrainingInputError(f"{template} leaves out the reply of the assistant; {remedy}")
    header = whole[: whole.rindex(_ANSWER)].removeprefix(prompt)
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


def _render(
    tokenizer: Any, template_args: Mapping[str, Any], chat: Sequence[Message], add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(chat), tokenize=False, add_generation_prompt=add_generation_prompt, **template_args
        )
    )
