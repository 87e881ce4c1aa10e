"""The card of a folder of datasets: README.md for readers and for `datasets.load_dataset`, pipeline.yaml beside it.

A card is a list of sections, each a title with facts by name; a new fact is a line in the function of its section.
The facts come from `stats.json` and from the configuration as plain data, so that a stored run has the same card as a
new one. What the configuration does not say is called unknown. The sections are one text, so this file is
longer than 400 lines.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import yaml

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.decontamination import contamination_lines
from ray_pipeline.data.rows import flat_counts
from ray_pipeline.pocket import WEIGHTS
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import canonical_json
from ray_pipeline.store.locations import without_folders
from ray_pipeline.store.markdown import key_table
from ray_pipeline.store.secrets import map_texts, redacted

PIPELINE = "pipeline.yaml"
#: `datasets` reads it in the folder of a kind, and readers of Parquet folders pass over it, unlike over a README.md.
_KIND_CARD = ".huggingface.yaml"
_SPLITS = {"train": "train", "val": "validation"}
#: Blocks of a configuration about where a run happens, not about what it makes.
_PLACES = ("run", "calls", "ray", "failure")
#: Blocks whose models write answers, and those whose models judge them.
_GENERATING = ("candidates", "loop.generator")
_JUDGING = ("judge", "critic", "select", "loop.reviewers")
_SAMPLE_ROWS = 2
_SAMPLE_CHARS = 600

_COLUMNS = {
    "kto": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the answer, as one assistant message",
        "label": "true: desirable, false: undesirable",
        "final_score": "f, mean of the judges' scores after the critic's penalty",
        "scores": "each judge and its score",
        "copies": "how many answers to the prompt with this text and label the row stands for",
        "model": "who gave the answer, if known",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "dpo": {
        "prompt": "chat messages up to the user's last turn",
        "chosen": "the desirable answer of the highest final score, as one assistant message",
        "rejected": "the undesirable answer of the lowest final score, likewise",
        "score_chosen, score_rejected": "their final scores",
        "score_gap": "score_chosen - score_rejected",
        "copies": "how many equal pairs of the prompt the row stands for",
        "chosen_model, rejected_model": "who gave the two answers, if known",
        "prompt_id, chosen_id, rejected_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
    "sft": {
        "prompt": "chat messages up to the user's last turn",
        "completion": "the chosen answer of the prompt's pair, as one assistant message",
        "final_score": "its final score",
        "copies": "how many pairs, or rows of the source, with this answer the row stands for",
        "model": "who gave the answer, if known",
        "candidate_id, prompt_id": "keys of the run's other tables",
        "split": "train or val; follows from the prompt's hash",
    },
}
#: The column that rows have only with `datasets.weights`.
_WEIGHT = {"weight": "the probability that the label, or the order of the pair, is right, by the judges' scores"}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a card says that is in no table.

    Attributes:
        text: how the preferences were made; "": the judges' consensus.
        license: of the rows, as the Hub spells it.
        config: every key of the configuration as plain data, for the card; empty: unknown.
        given: the keys without defaults, for `pipeline.yaml`.
        imported: the source of preferences made elsewhere, as plain data; empty: they were made by this run.
    """

    text: str = ""
    license: str = "other"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    imported: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Settings, text: str = "", **more: Any) -> Self:
        """The provenance of rows of a run with this configuration."""
        given = config.model_dump(mode="json", exclude_unset=True)
        return cls(text, config=config.model_dump(mode="json"), given=given, **more)

    def ready(self, block: str) -> Mapping[str, Any]:
        """The source of ready answers (`candidates`) or verdicts (`judge`), as plain data; empty without one."""
        source: Mapping[str, Any] = (self.config.get(block) or {}).get("source") or {}
        return source

    @property
    def written(self) -> bool:
        """Whether models wrote the answers, as far as the configuration says."""
        return not self.imported and not self.ready("candidates")

    @property
    def judged(self) -> bool:
        """Whether models judged them."""
        others = self.ready("judge") or self.programs
        judge = self.config.get("judge") or {}
        return not self.imported and not (others and not (judge.get("rubrics") or judge.get("rewards")))

    @property
    def programs(self) -> dict[str, str]:
        """Name and scale of each judge that is a program → its checker."""
        return {
            f"{one['name']}, {one['low']} to {one['high']}": " ".join(
                [_public(one["checker"]), *([canonical_json(one["options"])] if one.get("options") else [])]
            )
            for one in (self.config.get("judge") or {}).get("programs", ())
        }

    def stored(self) -> dict[str, Any]:
        """What `stats.json` keeps: all but the configuration, which the manifest has."""
        return {"text": self.text, "license": self.license, "imported": dict(self.imported)}


def write_card(folder: Folder, stats: Mapping[str, Any], origin: Provenance, kinds: Sequence[str]) -> None:
    """Write the card of datasets whose files are in `<folder>/<kind>/{train,val}/*.parquet`.

    Args:
        stats: as in `stats.json`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    configs = []
    for kind in kinds:
        files = _data_files(stats["rows"][kind])
        # `datasets` 5.2 caches a local folder by its name and that of the configuration, whatever its files contain.
        # The description is in the key of the cache too; without it, the rows of another run could be returned.
        what = {"description": f"datasets {stats['fingerprint']}"}
        if files:
            configs.append({"config_name": kind, "data_files": _below(kind, files), **what})
            own = {"configs": [{"config_name": stats["fingerprint"], "data_files": files}]}
            (folder / kind).write_bytes(_KIND_CARD, yaml.safe_dump(own, sort_keys=False).encode())
        else:
            (folder / kind).delete(_KIND_CARD)
        (folder / kind).delete("README.md")  # of an earlier version; readers of Parquet folders fail on it
    extra: dict[str, Any] = {"configs": configs} if configs else {}
    tags = ["quorum", *(["synthetic"] if origin.written else []), "preference", "rlaif", "trl", *kinds]
    data = DatasetCardData(
        pretty_name=f"Quorum preference data ({', '.join(kinds)})",
        license=origin.license,
        annotations_creators="machine-generated" if origin.judged else None,
        language_creators="machine-generated" if origin.written else None,
        task_categories=["text-generation"],
        size_categories=[_size_category(sum(_total(stats["rows"][kind]) for kind in kinds))],
        tags=tags,
        **extra,
    )
    body = "\n".join([*_head(stats, origin, kinds), *_sections(stats, origin), *_kinds(folder, stats, kinds)])
    card = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n{_CITATION}", ignore_metadata_errors=False)
    folder.write_bytes("README.md", str(card).encode())
    if origin.given:
        folder.write_bytes(PIPELINE, pipeline_text(origin.given).encode())


def _data_files(rows: Mapping[str, int]) -> list[dict[str, str]]:
    """Splits with rows; `datasets` 5.2 fails on a split without any."""
    return [{"split": shown, "path": f"{split}/*.parquet"} for split, shown in _SPLITS.items() if rows[split]]


def _below(kind: str, files: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{**file, "path": f"{kind}/{file['path']}"} for file in files]


# --- text -------------------------------------------------------------------------------------------------------------


def _head(stats: Mapping[str, Any], origin: Provenance, kinds: Sequence[str]) -> list[str]:
    judges = stats["judges"]
    kind = "judges" if origin.ready("judge") or origin.programs else "LLM judges"
    text = origin.text or f"Preference data by consensus of {len(judges)} {kind} ({', '.join(judges)})"
    text = " ".join(_public(word) for word in text.split(" "))
    made = _who(origin)
    if (origin.config.get("human_labels") or {}).get("use") == "gate":
        made += " Labels by people replace the models' where there are some."
    judge = origin.config.get("judge") or {}
    if judge.get("early_exit") == "labels":
        made += " Replies that could not change a label were not asked for: their rows lack scores, or final_score."
    if levels := judge.get("escalate"):
        shown = "; then ".join(_public(", ".join(level)) for level in levels)
        made += f" Later judges were asked only where the earlier ones left the label open ({shown})."
    lines = ["# Quorum preference data", "", f"{text}, ready for TRL's trainers. Rows are in training order.{made}", ""]
    lines += ["```python", "from datasets import load_dataset", ""]
    for kind in kinds:
        splits = ", ".join(file["split"] for file in _data_files(stats["rows"][kind]))
        lines.append(f'{kind} = load_dataset("path/to/this/folder", "{kind}")  # splits: {splits or "none, no row"}')
    return [*lines, "```", ""]


def _who(origin: Provenance) -> str:
    """Whether models wrote and judged the answers."""
    if origin.imported:
        return ""
    if origin.written and origin.judged and not origin.ready("judge") and not origin.programs:
        return " Answers and labels are synthetic: models wrote and judged them."
    answers = "are synthetic: models wrote them" if origin.written else "are those of the source"
    judges = " and ".join([*(["models"] if origin.judged else []), *(["programs"] if origin.programs else [])])
    if not origin.ready("judge"):
        return f" Answers {answers}; labels are synthetic: {judges} judged them."
    which = "Some" if origin.judged or origin.programs else "The"
    return f" Answers {answers}. {which} verdicts were not made by this run."


def _sections(stats: Mapping[str, Any], origin: Provenance) -> Iterator[str]:
    """What holds for all kinds. A section without facts is left out."""
    config = origin.config
    if not origin.judged:
        config = {**config, "judge": {}}
    models = dict(_models(config)) if not origin.imported else {}
    for title, facts in (
        ("Preference source", {origin.imported["type"]: _place(origin.imported)} if origin.imported else {}),
        ("Generators", _own_answers(config) if not origin.imported else {}),
        ("Ready verdicts", _ready(origin.ready("judge"))),
        ("Judges that are programs", origin.programs if not origin.imported else {}),
        ("Generators", _under(models, _GENERATING)),
        ("Judges and critics", _under(models, _JUDGING)),
        ("Rubrics", _rubrics(config) if not origin.imported else {}),
        ("Prompt sources", _prompt_sources(config) if not origin.imported else {}),
        ("Sampling", _sampling(config) if not origin.imported else {}),
        ("Overlap with benchmarks", contamination_lines(stats.get("contamination", ()))),
        ("Gate", stats["gate"] or {}),
        ("Limits and order", stats["settings"] | _lengths(stats)),
        ("Class weights for KTO", _weights(stats)),
        ("Made from", {**stats["lineage"], "datasets": stats["fingerprint"]}),
    ):
        if facts:
            yield from key_table(title, facts)


def _kinds(folder: Folder, stats: Mapping[str, Any], kinds: Sequence[str]) -> Iterator[str]:
    for kind in kinds:
        yield from (f"## {kind.upper()} data", "", f"For TRL's `{kind.upper()}Trainer`.", "")
        weighted = stats["settings"].get("weights") and kind != "sft"
        yield from key_table("Columns", _COLUMNS[kind] | (_WEIGHT if weighted else {}), level=3)
        yield from key_table("Rows", stats["rows"][kind], level=3)
        yield from key_table("Kept and left out", flat_counts(stats["counts"][kind], between=": "), level=3)
        if samples := _samples(folder / kind / "train"):
            yield from ("### Sample rows", "", "```json", *samples, "```", "")


def _samples(folder: Folder) -> list[str]:
    """The first training rows as JSON, long texts cut."""
    names = folder.names(".parquet")
    rows = folder.read_table(names[0]).slice(0, _SAMPLE_ROWS).to_pylist() if names else []
    short = map_texts(lambda text: text if len(text) <= _SAMPLE_CHARS else f"{text[:_SAMPLE_CHARS]} […]", rows)
    return [json.dumps(row, indent=2, ensure_ascii=False) for row in short]


_CITATION = """## Citation

The run has no record of a paper to cite. To name the software that made the rows:

```bibtex
@software{quorum_align,
  title = {Quorum: preference data by consensus of LLM judges, and a policy aligned with it, on Ray},
  note = {Python package quorum-align}
}
```
"""


def _weights(stats: Mapping[str, Any]) -> Mapping[str, Any]:
    if "kto" not in stats["rows"]:
        return {}
    return stats["kto_weights"] or {"none": "a class is empty, KTO cannot be trained"}


def _lengths(stats: Mapping[str, Any]) -> dict[str, str]:
    """How the tokens of the limits were counted, if it is known."""
    return {"tokens are counted with": stats["lengths"]} if "lengths" in stats else {}


def _total(rows: Mapping[str, int]) -> int:
    return rows["train"] + rows["val"]


def _size_category(rows: int) -> str:
    """The Hub's size category for a number of rows."""
    bounds = [("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7)]
    return next((name for name, bound in bounds if rows < bound), "10M<n<100M")


# --- facts of a configuration -----------------------------------------------------------------------------------------


def _models(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key that chooses a model → the model's name, in any workflow's configuration."""
    models, drawn = config.get("models") or {}, config.get("candidates") or {}
    blocks = {key: block for key, block in config.items() if key != "models"}
    if drawn.get("source"):
        del blocks["candidates"]
    elif generators := drawn.get("generators"):
        blocks["candidates"] = {"generators": list(generators)}
    for path, value in _leaves(blocks):
        if isinstance(value, str) and value in models and {"model", "generator", "generators"} & set(path.split(".")):
            model = models[value]
            at = " (behind an endpoint)" if model.get("engine") in ("openai", "openai_batch") else ""
            revision = f", revision {model['revision']}" if model.get("revision") else ""
            yield path, f"{_public(model['model'])}{revision}{at}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path, with the names of list entries that have one, and value of every leaf."""
    if isinstance(value, Mapping):
        inner = [(str(key), one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        inner = [
            ((one.get("name") if isinstance(one, Mapping) else None) or str(i), one) for i, one in enumerate(value)
        ]
    else:
        yield path, value
        return
    for name, one in inner:
        yield from _leaves(one, f"{path}.{name}" if path else name)


def _own_answers(config: Mapping[str, Any]) -> dict[str, str]:
    """Where the answers are from if the run did not generate them."""
    source = (config.get("candidates") or {}).get("source")
    return {"candidates.source": f"answers of {_place(source)}"} if source else {}


def _under(facts: Mapping[str, str], blocks: Sequence[str]) -> dict[str, str]:
    return {path: fact for path, fact in facts.items() if any(f"{path}.".startswith(f"{block}.") for block in blocks)}


def _rubrics(config: Mapping[str, Any]) -> dict[str, str]:
    built_in = f"text of the templates {_public(config.get('prompt_templates') or 'unknown')}"
    return {
        f"{rubric['name']}, {rubric.get('low', 1)} to {rubric.get('high', 10)}": _criterion(rubric) or built_in
        for rubric in (config.get("judge") or {}).get("rubrics", ())
    }


def _criterion(rubric: Mapping[str, Any]) -> str:
    text: str = rubric.get("text") or ""
    if rubric.get("checklist"):
        text = f"checklist, written for each prompt by {rubric['checklist']['model']}. {text}".rstrip()
    items = "; ".join(item["text"] for item in rubric.get("items") or ())
    return f"checklist: {items}" if items else text


def _ready(source: Mapping[str, Any]) -> dict[str, str]:
    """Where ready answers or verdicts are, and the column of each judge."""
    if not source:
        return {}
    columns = {f"judge {judge}": column for judge, column in (source.get("judges") or {}).items()}
    return {source["type"]: _place(source), **columns}


def _prompt_sources(config: Mapping[str, Any]) -> dict[str, str]:
    own = (config.get("candidates") or {}).get("source")
    sources = [own] if own else (config.get("prompts") or {}).get("sources", ())
    return {f"{n}. {_public(source['type'])}": _place(source) for n, source in enumerate(sources, 1)}


def _place(source: Mapping[str, Any]) -> str:
    """Where the rows of a source are, and their licence."""
    keys = ("name", "subset", "split", "revision", "path", "format", "count")
    where = [f"{key} {_public(str(source[key]))}" for key in keys if source.get(key)]
    licence = source.get("license")
    return "; ".join([", ".join(where), f"licence: {'unknown' if licence in (None, 'other') else licence}"])


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the calls behind the rows: of blocks named sampling or reviewing, and how many answers there are."""
    blocks = {block: config[block] for block in ("candidates", "loop", "judge", "critic", "select") if block in config}
    if _own_answers(config):
        del blocks["candidates"]
    single = ("candidates.k", "candidates.seed", "loop.responses")
    return {
        path: value
        for path, value in _leaves(blocks)
        if (path in single or {"sampling", "reviewing"} & set(path.split("."))) and value not in (None, "")
    }


# --- pipeline.yaml ----------------------------------------------------------------------------------------------------


def pipeline_text(config: Mapping[str, Any]) -> str:
    """A configuration in YAML as it may be published: without keys, local folders and the place of the run."""
    kept = {key: block for key, block in config.items() if key not in _PLACES}
    head = "# The configuration behind these files; local paths are cut to their last part."
    return f"{head}\n" + yaml.safe_dump(redacted(map_texts(_public, kept)), sort_keys=False, allow_unicode=True)


def _public(text: str) -> str:
    """A text without the folders of a local path; the name of a pocket model in place of its folder."""
    pocket = os.path.dirname(text.rstrip("/")) == str(WEIGHTS)
    return f"pocket:{os.path.basename(text.rstrip('/'))}" if pocket else without_folders(text)
