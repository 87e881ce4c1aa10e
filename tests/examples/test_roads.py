"""The roads of docs/roads.md: each shipped configuration runs from its file to KTO and DPO rows with a card, and the
document shows what comes out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.endpoint import KEY, Endpoint, opinion
from tests.operate.at_an_endpoint import quorum

ROOT = Path(__file__).parents[2]
ROADS = sorted(path.stem for path in (ROOT / "examples" / "roads").glob("*.yaml"))
DOCUMENT = (ROOT / "docs" / "roads.md").read_text(encoding="utf-8")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(ROOT)
    with Endpoint(opinion) as endpoint:
        yield endpoint


@pytest.mark.parametrize("road", ROADS)
def test_a_road_ends_in_data_with_a_card(road: str, server: Endpoint, tmp_path: Path) -> None:
    file = f"examples/roads/{road}.yaml"
    at = [f"models.judge.endpoint.base_url={server.url}"] if "endpoint:" in Path(file).read_text() else []
    told = quorum("run", "dmapo", "-c", file, "--run-dir", str(tmp_path / "run"), "--executor", "inprocess", *at)
    assert bool(server.asked) == bool(at)

    last = told[told.rindex("result: ") :].split("report: ")[0]
    shown = re.split(r"\n(?=[a-z]+: )", last.rstrip())
    assert [line.partition(":")[0] for line in shown][:3] == ["result", "kept", "datasets"]
    for line in (" ".join(line.split()) for line in shown):
        assert line in " ".join(DOCUMENT.split()), line
    for kind in ("kto", "dpo"):
        folder = tmp_path / "run" / "datasets" / kind
        assert sum(pq.read_table(part).num_rows for part in folder.glob("*/*.parquet")) > 0
    assert (tmp_path / "run" / "datasets" / "README.md").read_text().startswith("---\n")
    quorum("audit", str(tmp_path / "run"))
    quorum("export", str(tmp_path / "run"), "--out", str(tmp_path / "data"))
    assert (tmp_path / "data" / "README.md").is_file()


@pytest.mark.parametrize("road", ROADS)
def test_the_document_shows_the_file_and_the_command(road: str) -> None:
    text = (ROOT / "examples" / "roads" / f"{road}.yaml").read_text(encoding="utf-8")
    assert text[text.index("run:") :] in DOCUMENT
    assert f"quorum run dmapo -c examples/roads/{road}.yaml\n" in DOCUMENT
    (data,) = (path for path in (ROOT / "examples" / "roads").glob(f"{road}.*") if path.suffix != ".yaml")
    assert f"examples/roads/{data.name}" in text and data.name in DOCUMENT
