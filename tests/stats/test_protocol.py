"""What a score may be called; the files of benchmarks; answer makers that know nothing."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.bench.files import BenchmarkFileError, local_file, read_csv, read_rows, read_text
from ray_pipeline.bench.floors import CONSTANT, FLOORS, constant
from ray_pipeline.stats.protocol import Protocol, PublishedProtocol, score_name, settings_text, short_name

PROTOCOL = Protocol(
    benchmark="Some Bench 3",
    metric="LC",
    questions="q",
    judge="endpoint:big-judge@https://api.example.org/v1",
    judge_prompts="p",
    judge_sampling=settings_text(temperature=0),
    reading="r",
    order="both",
    reference="ref",
    reference_answers="ra",
    estimator="e",
    checker="c 1.0",
    answers="a",
)


def test_every_field_decides_the_name_and_the_fingerprint() -> None:
    published = PublishedProtocol(PROTOCOL)
    assert score_name(PROTOCOL, published).text == "Some Bench 3 LC"
    fingerprints = {PROTOCOL.fingerprint()}
    for field in dataclasses.fields(Protocol):
        other = dataclasses.replace(PROTOCOL, **{field.name: "something else"})
        name = score_name(other, published)
        assert name.departures == (field.name,) and not name.exact and "-style" in name.text
        fingerprints.add(name.fingerprint)
    assert len(fingerprints) == 1 + len(dataclasses.fields(Protocol))


def test_what_a_benchmark_leaves_open_does_not_decide_the_name() -> None:
    other = dataclasses.replace(PROTOCOL, answers="warmer")
    assert score_name(other, PublishedProtocol(PROTOCOL, frozenset({"answers"}))).exact
    assert other.fingerprint() != PROTOCOL.fingerprint()  # two such scores are still not measured alike


def test_other_protocols_say_what_they_are() -> None:
    published = PublishedProtocol(PROTOCOL)
    other = dataclasses.replace(PROTOCOL, judge="sha256:" + "ab" * 32, reference="base")
    assert score_name(other, published).text == "Some-Bench-3-style LC, judge weights abababababab, reference base"
    bare = dataclasses.replace(PROTOCOL, judge=None, reference=None, checker="c 2.0")
    assert score_name(bare, published).text == "Some-Bench-3-style LC, no reference, checker c 2.0"
    assert score_name(PROTOCOL, None).departures == ("published protocol",)
    assert short_name("endpoint:a@b@http://host/v1") == "a@b" and short_name("plain name") == "plain name"
    assert settings_text(b=1, a=True) == settings_text(a=True, b=1.0) != settings_text(a=1, b=1)


def test_files_from_a_path(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"a": "x\u2028y"}\n\n{"a": 2}\n')  # a line separator inside a text ends no row
    assert read_rows(str(lines)) == [{"a": "x\u2028y"}, {"a": 2}]
    (tmp_path / "rows.json").write_text('\n[{"a": 1}]')
    assert read_rows(str(tmp_path / "rows.json")) == [{"a": 1}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    assert len(read_rows(str(tmp_path / "rows.jsonl.gz"))) == 2
    (tmp_path / "t.csv").write_text('a,b\n1,"x, y"\n')
    assert read_csv(str(tmp_path / "t.csv")) == [{"a": "1", "b": "x, y"}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a": ', "line 2 is not valid JSON"),
        ("[1, 2]", "row 1: an object is needed, not int"),
        ("[{", "is not valid JSON"),
        ("", "has no rows"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BenchmarkFileError, match=says) as error:
        read_rows(str(tmp_path / "bad.json"))
    assert "bad.json" in str(error.value)


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchmarkFileError, match="there is no file /nowhere/x"):
        local_file("/nowhere/x")
    with pytest.raises(BenchmarkFileError, match="hf://datasets/OWNER/NAME"):
        local_file("hf://datasets/onlyname")
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    with pytest.raises(BenchmarkFileError, match="line 2"):
        read_csv(str(tmp_path / "bad.csv"))
    import huggingface_hub

    asked: list[Any] = []

    def download(repository: str, name: str, **how: Any) -> str:
        asked.append((repository, name, how))
        if name == "gone.csv":
            raise ConnectionError("no network")
        (tmp_path / "got").write_text("text")
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_text("hf://spaces/a/b@v1/dir/file.jsonl") == "text"
    assert asked == [("a/b", "dir/file.jsonl", {"repo_type": "space", "revision": "v1"})]
    with pytest.raises(BenchmarkFileError, match=r"ConnectionError: no network.*give its path"):
        local_file("hf://datasets/a/b/gone.csv")


def test_floors() -> None:
    talk = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "second"},
    ]
    said = {name: answer(talk) for name, answer in FLOORS.items()}
    assert said == {"empty": "", "x": "x", "echo": "second", "constant": CONSTANT}
    assert constant("moin")(talk) == "moin"
    with pytest.raises(ValueError, match="user message"):
        FLOORS["echo"]([])
