"""The texts that agents send, read from a YAML file that a user can edit.

A file has one block for each role. Each block has `system` (empty: no system message), `shared` (the part common to all
calls about one answer) and `rubric` (the part specific to this call), as Jinja templates.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, ValidationError, model_validator

from ray_pipeline.config.loading import NOT_YAML
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.base import Message
from ray_pipeline.store.keys import digest

#: `shared_first` lets the judges of a candidate share its prefix, `rubric_first` lets candidates share a rubric's.
Layout = Literal["shared_first", "rubric_first"]
#: A configuration key that chooses a layout.
LayoutKey = Annotated[
    Layout,
    Field(description="first part of the prompt: what the calls about one response share, or the rubric"),
]


class TemplateError(ValueError):
    """A template file is unusable; the message has the file, the block and the remedy."""


class RoleTemplate(Settings):
    """The three texts of one role."""

    system: str = ""
    shared: str
    rubric: str


class Templates(Settings):
    """All roles of a template file."""

    judge: RoleTemplate
    critic: RoleTemplate
    pairwise: RoleTemplate
    ticks: RoleTemplate
    items: RoleTemplate

    @model_validator(mode="before")
    @classmethod
    def _of_checklists(cls, values: Any) -> Any:
        """A file without the blocks of checklists, such as one for a model that ticks none, has those of `default`."""
        if not isinstance(values, dict) or {"ticks", "items"} <= values.keys():
            return values
        default = importlib.resources.files("configs") / "prompts" / "default.yaml"
        known = yaml.safe_load(default.read_text("utf-8"))
        return {"ticks": known["ticks"], "items": known["items"], **values}


_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)

#: Variables available to each role's texts, with example values for checking a file before a run starts.
VARIABLES: dict[str, dict[str, Any]] = {
    "judge": {"instruction": "x", "response": "x", "name": "x", "rubric": "x", "low": 1, "high": 10, "fence": "0"},
    "critic": {"instruction": "x", "response": "x", "fence": "0"},
    "pairwise": {"instruction": "x", "response_a": "x", "response_b": "x", "fence": "0"},
    "ticks": {"instruction": "x", "response": "x", "name": "x", "items": "x", "form": "x", "fence": "0"},
    "items": {"instruction": "x", "name": "x", "rubric": "x", "most": 8, "fence": "0"},
}

#: A word as long as every fence, for measuring texts.
ANY_FENCE = "0" * 8


def builtin_templates(folder: str = "") -> list[str]:
    """Names of the template files that come with Quorum: FOLDER/NAME.yaml under configs/prompts, and NAME/FOLDER.yaml
    for a set of files that belong together."""
    prompts = importlib.resources.files("configs") / "prompts"
    names = {f.name.removesuffix(".yaml") for f in (prompts / folder).iterdir() if f.name.endswith(".yaml")}
    sets = {f.name for f in prompts.iterdir() if folder and (f / f"{folder}.yaml").is_file()}
    return sorted(names | sets)


def load_templates(name_or_path: str) -> Templates:
    """Templates by built-in name (`default`, `pocket`) or from a YAML file.

    Raises:
        TemplateError: no such file, a missing block, a text with a variable that its role does not have, or texts that
            ask nothing or do not show what is judged.
    """
    templates = read_template_file(name_or_path, Templates)
    for role, variables in VARIABLES.items():
        block: RoleTemplate = getattr(templates, role)
        check_role(name_or_path, role, block, variables)
        for name in (name for name in variables if name.startswith("response")):
            if name not in jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(block.shared + block.rubric)):
                raise TemplateError(
                    f"prompt template file {name_or_path}, {role}: no text shows {{{{ {name} }}}}, so the {role} would "
                    "reply without having read it; add it to shared or rubric"
                )
        if not re.sub(r"\{[{%#].*?[}%#]\}", "", block.shared + block.rubric, flags=re.DOTALL).strip():
            raise TemplateError(
                f"prompt template file {name_or_path}, {role}: shared and rubric have no text of their own, so the "
                f"{role} would be asked nothing; write the question"
            )
    return templates


S = TypeVar("S", bound=Settings)


def read_template_file(name_or_path: str, kind: type[S], folder: str = "") -> S:
    """A YAML file of texts, by path or by its name under configs/prompts; variables are not checked yet.

    Raises:
        TemplateError: no such file, not YAML, or blocks other than those of `kind`.
    """
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        if not os.path.isfile(name_or_path):
            raise TemplateError(f"prompt template file {name_or_path} does not exist")
        try:
            with open(name_or_path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"prompt template file {name_or_path} cannot be read: {error}") from error
    else:
        if name_or_path not in builtin_templates(folder):
            known = ", ".join(builtin_templates(folder))
            raise TemplateError(f"no built-in prompt templates {name_or_path!r}; choose from {known}")
        prompts = importlib.resources.files("configs") / "prompts"
        own, of_set = prompts / folder / f"{name_or_path}.yaml", prompts / name_or_path / f"{folder}.yaml"
        text = (own if own.is_file() else of_set).read_text("utf-8")
    try:
        return kind.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].lower()}" for e in error.errors())
        raise TemplateError(f"prompt template file {name_or_path}: {'; '.join(problems)}") from error
    except NOT_YAML as error:
        raise TemplateError(f"prompt template file {name_or_path} is not valid YAML: {error}") from error


def check_role(file: str, role: str, block: RoleTemplate, variables: Mapping[str, Any]) -> None:
    """Render every text of a role with example values.

    Raises:
        TemplateError: a text has a variable that its role does not have, or rendering fails.
    """
    for part in [name for name in type(block).model_fields if isinstance(getattr(block, name), str)]:
        check_text(file, f"{role}.{part}", getattr(block, part), variables)


def check_text(file: str, key: str, text: str, variables: Mapping[str, Any]) -> None:
    """Render a text with example values.

    Raises:
        TemplateError: the text has an unknown variable, or rendering fails.
    """
    where, may_use = f"prompt template file {file}, {key}", f"it may use {', '.join(variables)}"
    try:
        # Also finds names inside branches that the example does not reach.
        unknown = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
        render_text(text, variables)
    except Exception as error:  # A template may raise anything.
        raise TemplateError(f"{where}: {error}; {may_use}") from error
    if unknown := unknown - set(variables) - set(_ENVIRONMENT.globals):
        raise TemplateError(f"{where}: {', '.join(sorted(unknown))} is undefined; {may_use}")


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def render_text(text: str, variables: Mapping[str, Any]) -> str:
    """A rendered text, without leading and trailing line breaks."""
    return _compiled(text).render(dict(variables)).strip("\n")


def render(template: RoleTemplate, layout: Layout, **variables: Any) -> list[Message]:
    """The messages of one call. Values are inserted as text and never read as templates."""
    shared, rubric = render_text(template.shared, variables), render_text(template.rubric, variables)
    user = f"{shared}\n{rubric}" if layout == "shared_first" else f"{rubric}\n{shared}"
    system = render_text(template.system, variables)
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]


def fence(made_of: Sequence[Any], texts: Sequence[str]) -> str:
    """The word in the tags around texts, which keeps a text from closing its own tag or opening another's.

    Args:
        made_of: plain data that determines the word: equal questions have equal prompts, and calls with the same
            word can share a prefix.
        texts: all texts inside the tags; the word occurs in none of them.
    """
    word, tries = digest(["fence", *made_of], size=4), 0
    while any(word in text for text in texts):
        tries += 1
        word = digest(["fence", *made_of, tries], size=4)
    return word


def part_lengths(template: RoleTemplate, **variables: Any) -> tuple[int, int]:
    """Characters of the shared part and of the own part of a call."""
    return len(render_text(template.shared, variables)), len(render_text(template.rubric, variables))


def best_layout(shared: float, rubric: float, judges: int) -> Layout:
    """The layout with the larger saving by the prefix cache, from the mean lengths of both parts.

    With N judges a shared part of length L is saved N−1 times; rubric first, a rubric of length R is saved for all
    but the first candidate: L·(N−1) > N·R puts the shared part first.
    """
    return "shared_first" if shared * (judges - 1) > judges * rubric else "rubric_first"


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as text for judges: a single message unchanged, longer conversations with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)
