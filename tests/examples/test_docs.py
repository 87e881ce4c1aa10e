"""What the documents say is there is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_files_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        assert "://" in link or (document.parent / link).exists(), link


def test_the_example_of_the_readme_is_the_one_that_runs() -> None:
    """Every call of the README's lines is in the example or in a test of its own."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1].split("```")[1]
    assert len([line for line in block.removeprefix("python").splitlines() if line.strip()]) <= 12
    example = (ROOT / "examples" / "judge_a_dataframe.py").read_text(encoding="utf-8")
    for call in ("open_engine", "judge", "critique", "gate", "to_kto"):
        assert f"quorum.{call}(" in block and f"quorum.{call}(" in example


def test_every_example_is_named_in_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert example.stem in tests, example
