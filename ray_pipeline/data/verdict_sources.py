"""Ready verdicts: scores or recorded replies of judges in a user's file, joined to candidates by content.

    wide    a row is a response: one column a judge                    judges: {helpfulness: score_a, accuracy: score_b}
    long    a row is one judge's verdict: `judge` names its column     judges: {helpfulness: "annotator 1"}, judge: who

A cell is a score, or with `format` a reply that is read in this house style. A cell that is neither gives an unread
verdict, whose `reason` says where it stands; an empty cell gives none.
"""

from __future__ import annotations

import collections
import posixpath
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.replies import Read, score_verdict
from ray_pipeline.agents.verdict_styles import Format
from ray_pipeline.agents.verdicts import Unread
from ray_pipeline.config.settings import Settings, refuse_repeated
from ray_pipeline.data.prompts import FAULTS_SHOWN
from ray_pipeline.data.sources import FileTable, HubTable, InputError, Record
from ray_pipeline.data.sources.answers import Drop, split_answer
from ray_pipeline.data.sources.chats import BadRow
from ray_pipeline.data.sources.columns import missing_column
from ray_pipeline.data.spill import Spill
from ray_pipeline.engines.base import Completion
from ray_pipeline.graph.stage import BadInput, Stage, WholeInput, WholeWork
from ray_pipeline.store.keys import digest, normalise_text, prompt_id
from ray_pipeline.store.outside import is_number, storable
from ray_pipeline.store.schemas import RECORDED, to_table
from ray_pipeline.store.tables import ShardedTable

#: A number as a spreadsheet writes it in a cell of text, also in countries with a decimal comma ("8,5"). Three digits
#: after a comma may be thousands; "8/10" is no number either.
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+|\d+,\d{1,2})")
_SHOWN = 60
_NO_ANSWER = {
    "empty": "prompt or response is empty",
    "not_an_answer": "a chat must end with the response",
    "unfinished_thought": "the response ends within its thoughts",
}


class _Verdicts(Settings):
    """Keys of every source of ready verdicts."""

    prompt: str = Field("prompt", description="column with the prompt: text or chat messages")
    response: str = Field("response", description="column with the response: text or chat messages")
    judges: dict[str, str] = Field(
        min_length=1,
        description="judge → column with its scores; a list where the two have the same names. With `judge`: judge → "
        "its name in that column",
    )
    judge: str | None = Field(
        None, description="column with the name of the judge, where each row is the verdict of one; default: none"
    )
    verdict: str = Field("score", description="column with the score or reply, where `judge` is set")
    format: Format | None = Field(
        None, description="house style in which recorded replies are read; default: the columns hold scores"
    )
    low: int = Field(1, description="lowest score")
    high: int = Field(10, description="highest score")

    @field_validator("judges", mode="before")
    @classmethod
    def _same_names(cls, judges: Any) -> Any:
        """A list means that columns are called like their judges."""
        if not isinstance(judges, (list, tuple)):
            return judges
        refuse_repeated(map(str, judges), "judges")
        return {name: name for name in judges}

    @model_validator(mode="after")
    def _distinct(self) -> _Verdicts:
        refuse_repeated(self.judges.values(), "columns of judges" if self.judge is None else "names of judges")
        if self.judge is None and "verdict" in self.model_fields_set:
            raise ValueError("verdict has no effect without judge, the column with the name of the judge")
        _ = self.rubrics  # names and scale
        return self

    @property
    def rubrics(self) -> tuple[Rubric, ...]:
        """The judges: name and scale of each."""
        return tuple(Rubric(name=name, low=self.low, high=self.high) for name in self.judges)

    def columns(self, present: Collection[str], whole: bool) -> list[str]:
        """The columns to read; one row may lack that of a judge. Raises BadRow where one is missing that is needed."""
        cells = [*self.judges.values()] if self.judge is None else [self.judge, self.verdict]
        for name in [self.prompt, self.response, *(cells if whole or self.judge is not None else ())]:
            if name not in present:
                raise BadRow(missing_column(name, present))
        return list(dict.fromkeys([self.prompt, self.response, *cells]))


class HubVerdicts(_Verdicts, HubTable):
    """A dataset of the Hugging Face Hub, or a local folder that `load_dataset` opens."""


class FileVerdicts(_Verdicts, FileTable):
    """CSV, Parquet or JSON files (one object a line, or an array): a path or URI, which may hold *, ** and ?."""


VerdictSource = Annotated[HubVerdicts | FileVerdicts, Field(discriminator="type")]


class _Given(Settings):
    source: VerdictSource
    digests: dict[str, str]


def response_key(prompt: str, response: str) -> str:
    """Content of a response: equal for texts that differ in blanks of prose alone, as prompts are told apart."""
    return digest(["answer", prompt, normalise_text(storable(response))])


def recorded_rows(source: VerdictSource, name: str, group: str) -> Stage:
    """The verdicts of the source by content. Raises InputError when it cannot be found."""
    digests = source.digests()
    return Stage(
        name=name,
        group=group,
        role="recorded verdicts",
        work=WholeWork(function=read_source, settings=_Given(source=source, digests=digests), tables=("recorded",)),
        config=source.decisive(exclude=source.moves),
        external=digests,
    )


def read_source(given: WholeInput) -> dict[str, Any]:
    """One row for each response and judge that the source has a cell for, and its counts."""
    settings: _Given = given.settings
    source = settings.source
    reader = _Reader(source)
    out = ShardedTable(given.folder.location, "recorded", given.num_shards, given.fingerprint)
    with Spill(RECORDED, given.num_shards) as spill:
        try:
            for record in source.records(source.columns, settings.digests):
                for row in reader.take(record):
                    spill.add(row)
            reader.check(spill.rows)
        except InputError as error:
            raise BadInput(str(error)) from error
        for shard in range(given.num_shards):
            out.write(shard, to_table(reader.settle(spill.read(shard).to_pylist()), RECORDED))
    counts = reader.counted()
    given.log(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    return {"counts": counts, "warnings": list(reader.warnings(given.log))}


class _Reader:
    """Makes rows of schema RECORDED from those of the source, with counts."""

    def __init__(self, source: VerdictSource) -> None:
        self._source = source
        self._names = {name: judge for judge, name in source.judges.items()}
        self._counts: dict[str, int] = dict.fromkeys(("read", "malformed", "empty_cells", "repeated"), 0)
        self._verdicts: collections.Counter[str] = collections.Counter()
        self._strangers: collections.Counter[str] = collections.Counter()
        self._faults: list[str] = []
        self._unread: list[str] = []

    def take(self, record: Record) -> Iterator[dict[str, Any]]:
        """A row for each cell that has a value."""
        self._counts["read"] += 1
        place = record.where if isinstance(self._source, HubTable) else posixpath.basename(record.where)
        try:
            if record.fault:
                raise BadRow(record.fault)
            prompt, response = self._content(record.row)
            cells = list(self._cells(record.row))
        except BadRow as fault:
            self._counts["malformed"] += 1
            if len(self._faults) < FAULTS_SHOWN:
                self._faults.append(f"{record.where}{' ' if record.fault else ': '}{fault}")
            return
        key = response_key(prompt, response)
        for judge, column, value in cells:
            if value is None or value == "" or value != value or (isinstance(value, str) and not value.strip()):
                self._counts["empty_cells"] += 1
                continue
            score, status, reason, raw = self._verdict(value, f"{place}, column {column!r}")
            yield {
                "response_key": key,
                "prompt_id": prompt,
                "judge": judge,
                "score": score,
                "reason": reason,
                "parse_status": status,
                "raw": raw,
                "place": place,
            }

    def _content(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt id and response."""
        source = self._source
        for name in (source.prompt, source.response):
            if not row[name]:
                raise BadRow(f"column {name!r} is empty")
        try:
            messages, response, _ = split_answer(
                row[source.prompt], row[source.response], (source.prompt, source.response), source.thoughts
            )
        except Drop as reason:
            raise BadRow(_NO_ANSWER[str(reason)]) from reason
        return prompt_id(messages), response

    def _cells(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
        """Judge, column and value of every cell."""
        source = self._source
        if source.judge is None:
            yield from ((judge, column, row.get(column)) for judge, column in source.judges.items())
            return
        name = row.get(source.judge)
        if name is None or not str(name).strip():
            raise BadRow(f"column {source.judge!r} is empty; it holds the name of the judge")
        if (judge := self._names.get(str(name).strip())) is None:
            self._strangers[str(name).strip()[:_SHOWN]] += 1
        else:
            yield judge, source.verdict, row.get(source.verdict)

    def _verdict(self, value: Any, place: str) -> tuple[float | None, str, str | None, str]:
        """Score, status, reason and raw text of a cell."""
        source = self._source
        if source.format is None:
            score, why = _score(value, source.low, source.high)
            raw = storable(str(value))
            return score, ("unparsed" if why else "ok"), (f"unread: invalid\n{place}: {why}" if why else None), raw
        if not isinstance(value, str):
            return None, "unparsed", f"unread: invalid\n{place}: {value!r} is not a reply in text", storable(str(value))
        found = score_verdict(Completion(value, "stop", 0, 0, 0), source.low, source.high, source.format)
        if isinstance(found, Unread):
            return None, "unparsed", f"{found.reason}\n{place}", storable(value)
        assert isinstance(found, Read)
        return float(found.fields["score"]), found.status, found.fields["reason"], storable(value)

    def settle(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One row for each response and judge; of several that differ, none is read."""
        settled: dict[tuple[str, str], dict[str, Any]] = {}
        for new in rows:
            key = (new["response_key"], new["judge"])
            old = settled.setdefault(key, new)
            if old is new:
                continue
            self._counts["repeated"] += 1
            if (old["score"], old["parse_status"]) != (new["score"], new["parse_status"]):
                both = " and ".join(f"{one['raw'][:_SHOWN]!r} at {one['place']}" for one in (old, new))
                why = {"score": None, "parse_status": "unparsed", "reason": f"unread: contradictory\n{both}"}
                settled[key] = {**old, **why}
        for row in settled.values():
            self._verdicts[f"{row['judge']}.{row['parse_status']}"] += 1
            if row["score"] is None and len(self._unread) < FAULTS_SHOWN:
                self._unread.append(row["reason"].replace("\n", ": "))
        return list(settled.values())

    def check(self, verdicts: int) -> None:
        """Raises InputError where the source gives no verdict at all."""
        place, read = self._source.place, self._counts["read"]
        if not read:
            raise InputError(f"{place} has no rows; check that it was written")
        if verdicts:
            return
        if self._counts["malformed"]:
            raise InputError(f"{place}: {self._counts['malformed']} of {read} rows are malformed: {self._faults[0]}")
        if self._strangers:
            raise InputError(
                f"{place}: column {self._source.judge!r} names none of the judges "
                f"{', '.join(map(repr, self._names))}; it has {', '.join(map(repr, list(self._strangers)[:5]))}"
            )
        columns = [self._source.verdict] if self._source.judge else self._source.judges.values()
        raise InputError(f"{place}: all cells of {', '.join(map(repr, columns))} are empty; choose other columns")

    def counted(self) -> dict[str, int]:
        """Counts of rows and cells, and verdicts by judge and status."""
        others = {"other_judges": self._strangers.total()} if self._strangers else {}
        return {**self._counts, **others, **dict(sorted(self._verdicts.items()))}

    def warnings(self, log: Callable[[str], None]) -> Iterator[str]:
        """Lines for the end of the run; the log names more of the rows."""
        place = self._source.default_label
        for fault in self._faults:
            log(f"dropped as malformed: {fault}")
        if bad := self._counts["malformed"]:
            yield f"{place}: {bad:,} of {self._counts['read']:,} rows are malformed: {self._faults[0]}"
        for line in self._unread:
            log(line)
        if self._unread:
            lost = sum(count for name, count in self._verdicts.items() if name.endswith(".unparsed"))
            yield f"{place}: {lost:,} of {self._verdicts.total():,} verdicts cannot be read; {self._unread[0]}"
        if self._strangers:
            names = ", ".join(f"{name} ({count:,})" for name, count in self._strangers.most_common(5))
            yield f"{place}: rows of judges that judge.source.judges does not name are left out: {names}"


def _score(value: Any, low: int, high: int) -> tuple[float | None, str | None]:
    """A number on the scale, or why the value is none."""
    shown = repr(value)[:_SHOWN]
    text = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
    if not text and not is_number(value):
        return None, f"{shown} is not a number"
    number = float(value.replace(",", ".")) if text else value
    if not low <= number <= high:
        return None, f"{shown} is not on the scale from {low} to {high}"
    return float(number), None
