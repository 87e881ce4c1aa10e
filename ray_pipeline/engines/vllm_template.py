"""The chat template of a model that vLLM serves."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.engines.base import EngineStartError, causes
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.store.local import local_copy


def own_template(spec: VllmSpec) -> str | None:
    """Text of the specification's template file, if it has one. Raises EngineStartError if it cannot be read."""
    if spec.chat_template is None:
        return None
    try:
        return Path(spec.chat_template).read_text()
    except OSError as error:
        raise EngineStartError(f"cannot read chat_template {spec.chat_template!r}: {error}") from error


def load_template(spec: VllmSpec, revision: str | None) -> ChatTemplate:
    """The template with the tokenizer that it is rendered for.

    Args:
        revision: commit of a Hub model; None for a folder.

    Raises:
        EngineStartError: the tokenizer cannot be loaded, or there is no template.
    """
    with heavy_imports():
        from transformers import AutoTokenizer
    source = str(spec.args.get("tokenizer", spec.model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(source),
            revision=revision if revision and source == spec.model else "main",
            trust_remote_code=spec.trust_remote_code,
        )
    except Exception as error:
        raise EngineStartError(f"cannot load the tokenizer of {source!r}: {causes(error)}") from error
    try:
        return ChatTemplate(tokenizer, own_template(spec), spec.chat_template_args)
    except ValueError as error:
        raise EngineStartError(
            f"{source!r} has no chat template (a base model, or its chat_template.jinja was not copied); "
            "serve an instruction-tuned model, or set the model's key chat_template to a Jinja file"
        ) from error
