"""Starter files of `quorum init`: a shipped configuration, with the blocks that a machine needs otherwise put in place.

The shipped files are the only source, so that a starter file cannot differ from them: text and comments are theirs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import yaml

from ray_pipeline.config.loading import read_text

Machine = Literal["laptop", "gpus", "endpoint"]
MACHINES: Mapping[str, str] = {
    "laptop": "a laptop without a GPU",
    "gpus": "machines with GPUs",
    "endpoint": "an OpenAI-compatible endpoint, without GPU or local model",
}

#: The block with all keys of an endpoint, and the model of those that do not judge, with its prices.
_ENDPOINT_FILE, _OTHER_MODEL = "endpoint", "gpt-4o-mini-2024-07-18"
_OTHER_PRICES = "{input: 0.15, output: 0.6, currency: USD, source: list price of gpt-4o-mini; check it}"

#: Why a workflow that trains has no starter file for an endpoint, and what to do.
NO_WEIGHTS = (
    "it trains models, and an endpoint gives out no weights. Make the data at the endpoint (`quorum init dmapo --for "
    "endpoint`), and train on it where the weights are (`quorum init train --for gpus`)"
)


@dataclasses.dataclass(frozen=True)
class Starter:
    """How a starter file follows from a shipped one.

    Attributes:
        source: name of the shipped configuration.
        at_endpoint: every model is at one endpoint, and nothing is trained.
        live: the commented blocks at the end of the source are part of the file.
        blocks: top-level block → its text instead; "" leaves it out.
    """

    source: str
    at_endpoint: bool = False
    live: bool = False
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def text(self, workflow: str, machine: Machine, file: str) -> str:
        """The starter file.

        Args:
            file: its name, for the commands in its comment.
        """
        comment, blocks = _split(_uncommented(read_text(self.source)) if self.live else read_text(self.source))
        changes = dict(self.blocks)
        if self.at_endpoint:
            models = yaml.safe_load(blocks["models"])["models"]
            changes["models"] = _at_endpoint(list(models))
            changes |= {"evaluate": "", "benchmarks": "", "ray": ""}
            if "train" in blocks:
                changes["train"] = "train: null  # only data is made, and the report is about it\n"
        for name, text in changes.items():
            if name in blocks or text:
                blocks[name] = text
        head = _head(workflow, machine, file, self.source)
        return head + ("" if self.at_endpoint or self.live else f"#\n{comment}") + "".join(blocks.values())


def _head(workflow: str, machine: Machine, file: str, source: str) -> str:
    lines = [
        f"Starter file of `quorum init {workflow} --for {machine}`: {MACHINES[machine]}.",
        f"From configs/{source}.yaml; all keys: `quorum config reference`.",
        f"Next: quorum check {workflow} -c {file}",
        f"Then: quorum run {workflow} -c {file}",
    ]
    if machine == "endpoint":
        lines.insert(1, "Set base_url, model, prices and budget, and the environment variable that api_key_env names.")
    return "".join(f"# {line}\n" for line in lines)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """The comment at the head of a YAML file, and the text of every top-level block by its key."""
    comment, *parts = re.split(r"^(?=[A-Za-z_]+:)", text, flags=re.MULTILINE)
    return comment, {part.partition(":")[0]: part for part in parts}


def _uncommented(text: str) -> str:
    """The file with its commented top-level blocks as blocks."""
    blocks = re.compile(r"^# ?(?=[A-Za-z_]+:( |$)|  +\S)", flags=re.MULTILINE)
    comment, parts = _split(text)
    return comment + blocks.sub("", "".join(parts.values()))


def _at_endpoint(keys: Sequence[str]) -> str:
    """The `models` block with every key at one endpoint; the first is the judge, if there is one."""
    first, *others = sorted(keys, key=lambda key: key != "judge")
    own = re.search(r"^  judge:\n((?:    .*\n)+)", _split(read_text(_ENDPOINT_FILE))[1]["models"], re.MULTILINE)
    assert own is not None
    lines = [f"models:\n  {first}: &model\n{own[1].replace('    endpoint:', '    endpoint: &endpoint')}"]
    lines += [
        f"  {key}:\n    <<: *model\n    model: {_OTHER_MODEL}\n"
        f"    endpoint: {{<<: *endpoint, prices: {_OTHER_PRICES}}}\n"
        for key in others
    ]
    return "".join(lines)
