"""The questions of the public benchmarks: their settings, their files, and the table that all later stages read."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.agents.judges import SamplingSettings
from ray_pipeline.bench.alpaca_eval.judge import PreferenceAsking
from ray_pipeline.bench.alpaca_eval.score import (
    REFERENCE,
    GamedRows,
    Instruction,
    OrderRule,
    difficulties_of,
    gamed_rows_of,
    instructions_of,
)
from ray_pipeline.bench.files import BenchmarkFileError, read_csv, read_rows, read_text
from ray_pipeline.bench.ifeval.score import IfevalPrompt, prompts_of
from ray_pipeline.bench.judge_prompts import (
    BenchPrompt,
    PreferencePrompt,
    mt_bench_prompts,
    own_mt_bench_prompts,
    own_preference_prompt,
    preference_prompt,
)
from ray_pipeline.bench.mt_bench import score as mt_bench
from ray_pipeline.bench.mt_bench.judge import BenchAsking
from ray_pipeline.bench.schemas import BENCH_QUESTIONS
from ray_pipeline.config.settings import Settings
from ray_pipeline.engines.identity import text_digest
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.pocket.bench_files import is_pocket, pocket_rows
from ray_pipeline.store.keys import canonical_json, prompt_id, shard_of, unit_hash
from ray_pipeline.store.schemas import to_table
from ray_pipeline.store.tables import ShardedTable

Benchmark = Literal["mt_bench", "alpaca_eval", "ifeval"]
FloorName = Literal["empty", "x", "echo", "constant"]

#: A prompt file of this name is the project's own wording.
OWN = "own"


def source_rows(source: str) -> list[dict[str, Any]]:
    """Rows of a question file: a path, hf://datasets/OWNER/NAME[@REVISION]/FILE (also hf://spaces/…), or one that the
    pocket world makes (`pocket:mt_bench`). Raises BenchmarkFileError."""
    if not is_pocket(source):
        return read_rows(source)
    try:
        return pocket_rows(source)
    except ValueError as error:
        raise BenchmarkFileError(str(error)) from error


class MtBenchSettings(Settings):
    """The `mt_bench` block. The defaults are the published protocol but for the judge and its prompts.

    Attributes:
        references: answers that are shown in math, reasoning and coding; null: none are shown.
        prompts: judge prompts, in the published form; `own`: the project's wording of them.
        modes: grades of single answers, comparisons with `against` in both orders, or both.
        against: the model (by its name in this run) that the others are compared with.
        limit: so many questions, those of the smallest hash.
    """

    questions: str = "hf://spaces/lmsys/mt-bench/data/mt_bench/question.jsonl"
    references: str | None = "hf://spaces/pe-nlp/mt-bench/data/mt_bench/reference_answer/gpt-4.jsonl"
    reference_name: str = "gpt-4"
    prompts: str = OWN
    judge: str = "judge"
    asking: BenchAsking = BenchAsking()
    modes: tuple[mt_bench.Mode, ...] = Field(("single",), min_length=1)
    against: str = "base"
    answer_tokens: int = Field(mt_bench.ANSWER_TOKENS, ge=1)
    temperatures: dict[str, float] = Field(default_factory=lambda: dict(mt_bench.CATEGORY_TEMPERATURES))
    limit: int | None = Field(None, ge=1)

    def load(self) -> list[mt_bench.Question]:
        """Raises BenchmarkFileError."""
        rows = source_rows(self.questions)
        references = source_rows(self.references) if self.references is not None else []
        return mt_bench.questions_of(rows, references, self.questions)

    def judge_prompts(self) -> dict[str, BenchPrompt]:
        """Raises BenchmarkFileError or TemplateError."""
        return (
            own_mt_bench_prompts() if self.prompts == OWN else mt_bench_prompts(read_rows(self.prompts), self.prompts)
        )


#: The published instructions, at any commit of the data set; a copy elsewhere may have been edited.
_PUBLISHED_REFERENCE = re.compile(r"hf://datasets/tatsu-lab/alpaca_eval(@[\w.-]+)?/alpaca_eval_gpt4_baseline\.json")


class AlpacaEvalSettings(Settings):
    """The `alpaca_eval` block. The defaults are the published protocol but for the judge and its prompt.

    Attributes:
        reference: instructions with the outputs that a model is compared with.
        gamed: rows of the gamed baselines, for the published length control (df_gamed.csv); null: a fit without them.
        difficulties: of the instructions by place; default: those in `gamed`.
        prompt, labels: the judge's prompt, and what it answers for the output shown first and second.
        order: the published coin of each instruction, or both orders.
        limit: so many instructions, those of the smallest hash.
    """

    reference: str = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json"
    reference_name: str = REFERENCE
    gamed: str | None = "hf://datasets/tatsu-lab/alpaca_eval/df_gamed.csv"
    difficulties: str | None = None
    prompt: str = OWN
    labels: tuple[str, str] = ("m", "M")
    judge: str = "judge"
    asking: PreferenceAsking = PreferenceAsking()
    order: OrderRule = "seeded"
    order_seed: int = 0
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=2048)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _difficulties(self) -> AlpacaEvalSettings:
        if self.difficulties is not None and self.gamed is None:
            raise ValueError("difficulties is read only together with gamed; name both or neither")
        if self.prompt == OWN and self.labels != PreferencePrompt.model_fields["labels"].default:
            raise ValueError("labels is read only with a prompt file; the project's own prompt brings its labels")
        return self

    @property
    def published_instructions(self) -> bool:
        """Whether all instructions are asked, out of the benchmark's own file on the hub."""
        return self.limit is None and _PUBLISHED_REFERENCE.fullmatch(self.reference) is not None

    def load(self) -> list[Instruction]:
        """Raises BenchmarkFileError."""
        return instructions_of(source_rows(self.reference), self.reference)

    def judge_prompt(self) -> PreferencePrompt:
        """Raises BenchmarkFileError or TemplateError."""
        if self.prompt == OWN:
            return own_preference_prompt()
        return preference_prompt(read_text(self.prompt), self.prompt, self.labels)

    def length_data(self) -> tuple[GamedRows, Any] | None:
        """Gamed rows and difficulties by place, or None. Raises BenchmarkFileError."""
        if self.gamed is None:
            return None
        gamed = read_csv(self.gamed)
        hard = read_csv(self.difficulties) if self.difficulties is not None else gamed
        return gamed_rows_of(gamed, self.gamed), difficulties_of(hard, self.difficulties or self.gamed)


class IfevalSettings(Settings):
    """The `ifeval` block: prompts in the published form. The checkers come with `quorum-align[ifeval]`."""

    prompts: str = "hf://datasets/google/IFEval/ifeval_input_data.jsonl"
    sampling: SamplingSettings = SamplingSettings(temperature=0.0, max_tokens=1280)
    limit: int | None = Field(None, ge=1)

    def load(self) -> list[IfevalPrompt]:
        """Raises BenchmarkFileError."""
        try:
            return prompts_of(source_rows(self.prompts), self.prompts)
        except BenchmarkFileError:
            raise
        except ValueError as error:
            raise BenchmarkFileError(str(error)) from error


class BenchmarksSettings(Settings):
    """The `benchmarks` block: which public benchmarks are run; one that is null is not.

    Attributes:
        floors: answer makers that know nothing, run beside the models on every benchmark.
        seed: of warm answers and of `limit`.
        draws: bootstrap samples of every interval.
    """

    mt_bench: MtBenchSettings | None = None
    alpaca_eval: AlpacaEvalSettings | None = None
    ifeval: IfevalSettings | None = None
    floors: tuple[FloorName, ...] = ()
    seed: int = 0
    draws: int = Field(2000, ge=100)

    @model_validator(mode="after")
    def _something(self) -> BenchmarksSettings:
        if not self.chosen:
            raise ValueError("no benchmark is chosen; name mt_bench, alpaca_eval or ifeval ({} takes its defaults)")
        if len(set(self.floors)) < len(self.floors):
            raise ValueError(f"floors names one twice: {', '.join(self.floors)}")
        return self

    @property
    def chosen(self) -> list[Benchmark]:
        found: list[Benchmark] = []
        found += ["mt_bench"] if self.mt_bench else []
        found += ["alpaca_eval"] if self.alpaca_eval else []
        found += ["ifeval"] if self.ifeval else []
        return found

    @property
    def judges(self) -> list[str]:
        """Keys of the judging models, in the order of the benchmarks."""
        return list(dict.fromkeys(b.judge for b in (self.mt_bench, self.alpaca_eval) if b is not None))

    def sources(self) -> dict[str, str]:
        """Key of every question file → its place."""
        found: dict[str, str] = {}
        if self.mt_bench is not None:
            found["mt_bench.questions"] = self.mt_bench.questions
            if self.mt_bench.references is not None:
                found["mt_bench.references"] = self.mt_bench.references
        if self.alpaca_eval is not None:
            found["alpaca_eval.reference"] = self.alpaca_eval.reference
        if self.ifeval is not None:
            found["ifeval.prompts"] = self.ifeval.prompts
        return found


@functools.cache
def _content(source: str) -> str:
    return text_digest(canonical_json(source_rows(source)) if is_pocket(source) else read_text(source))


def content_digests(sources: Mapping[str, str]) -> dict[str, str]:
    """Content digest of each file. Raises BenchmarkFileError, naming the key's file."""
    return {key: _content(source) for key, source in sources.items()}


@dataclasses.dataclass(frozen=True)
class _Given:
    settings: BenchmarksSettings
    digests: dict[str, str]


def questions_stage(settings: BenchmarksSettings) -> Stage:
    """The table of all questions of the chosen benchmarks. Raises BenchmarkFileError for a file that is not there."""
    digests = content_digests(settings.sources())
    limits = {name: getattr(settings, name).limit for name in settings.chosen}
    return Stage(
        name="bench-questions",
        group="bench-questions",
        work=WholeWork(function=make_questions, settings=_Given(settings, digests), tables=("bench_questions",)),
        config={"limits": limits, "seed": settings.seed},
        external=digests,
    )


def make_questions(given: WholeInput) -> dict[str, Any]:
    """Write the sharded table. Raises BadInput for a file that cannot be used, or that changed since the start."""
    known: _Given = given.settings
    try:
        if content_digests(known.settings.sources()) != known.digests:
            raise BadInput("a question file has changed since the run began; run the same command again")
        rows = question_rows(known.settings)
    except BenchmarkFileError as error:
        raise BadInput(str(error)) from error
    table = ShardedTable(given.folder.location, "bench_questions", given.num_shards, given.fingerprint)
    shards: list[list[dict[str, Any]]] = [[] for _ in range(given.num_shards)]
    for row in rows:
        shards[shard_of(row["prompt_id"], given.num_shards)].append(row)
    for shard, part in enumerate(shards):
        table.write(shard, to_table(part, BENCH_QUESTIONS))
    counts = {name: sum(row["benchmark"] == name for row in rows) for name in known.settings.chosen}
    given.log(", ".join(f"{name} {n}" for name, n in counts.items()))
    return {"counts": counts}


def question_rows(settings: BenchmarksSettings) -> list[dict[str, Any]]:
    """Rows of the questions table, benchmark by benchmark in the order of the files, each cut to its limit.

    Raises:
        BenchmarkFileError: a file cannot be used.
    """
    loaders: dict[str, Callable[[], list[dict[str, Any]]]] = {}
    if settings.mt_bench is not None:
        loaders["mt_bench"] = functools.partial(_mt_rows, settings.mt_bench.load)
    if settings.alpaca_eval is not None:
        loaders["alpaca_eval"] = functools.partial(_alpaca_rows, settings.alpaca_eval.load)
    if settings.ifeval is not None:
        loaders["ifeval"] = functools.partial(_ifeval_rows, settings.ifeval.load)
    found = []
    for name, load in loaders.items():
        rows = load()
        by_hash = sorted(rows, key=lambda row: unit_hash("bench", settings.seed, row["benchmark"], row["question_id"]))
        kept = {row["question_id"] for row in by_hash[: getattr(settings, name).limit]}
        found += [row for row in rows if row["question_id"] in kept]
    return found


def _row(benchmark: Benchmark, identifier: Any, position: int, turns: Sequence[str], **more: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "question_id": str(identifier),
        "prompt_id": prompt_id([{"role": "user", "content": turns[0]}]),
        "position": position,
        "category": "",
        "turns": list(turns),
        "references": None,
        "checks": None,
        **more,
    }


def _mt_rows(load: Callable[[], list[mt_bench.Question]]) -> list[dict[str, Any]]:
    return [
        _row(
            "mt_bench",
            q.question_id,
            place,
            q.turns,
            category=q.category,
            references=None if q.references is None else list(q.references),
        )
        for place, q in enumerate(load())
    ]


def _alpaca_rows(load: Callable[[], list[Instruction]]) -> list[dict[str, Any]]:
    return [
        _row("alpaca_eval", i.index, i.index, [i.instruction], category=i.dataset, references=[i.reference])
        for i in load()
    ]


def _ifeval_rows(load: Callable[[], list[IfevalPrompt]]) -> list[dict[str, Any]]:
    return [
        _row(
            "ifeval",
            p.key,
            place,
            [p.prompt],
            checks=canonical_json({"instructions": list(p.instructions), "arguments": [dict(a) for a in p.arguments]}),
        )
        for place, p in enumerate(load())
    ]


# --- back from the table ----------------------------------------------------------------------------------------------


def mt_question(row: Mapping[str, Any]) -> mt_bench.Question:
    """MT-Bench's question in a row of the table."""
    references = row["references"]
    return mt_bench.Question(
        int(row["question_id"]),
        row["category"],
        (row["turns"][0], row["turns"][1]),
        None if references is None else (references[0], references[1]),
    )


def alpaca_instruction(row: Mapping[str, Any]) -> Instruction:
    """AlpacaEval's instruction in a row of the table."""
    return Instruction(row["position"], row["turns"][0], row["references"][0], row["category"])


def ifeval_prompt(row: Mapping[str, Any]) -> IfevalPrompt:
    """IFEval's prompt in a row of the table."""
    checks = json.loads(row["checks"])
    return IfevalPrompt(
        int(row["question_id"]), row["turns"][0], tuple(checks["instructions"]), tuple(checks["arguments"])
    )


__all__ = [
    "AlpacaEvalSettings",
    "BenchmarksSettings",
    "IfevalSettings",
    "MtBenchSettings",
    "alpaca_instruction",
    "content_digests",
    "ifeval_prompt",
    "mt_question",
    "question_rows",
    "questions_stage",
]
