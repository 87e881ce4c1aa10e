"""Every file of examples/ runs as its first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.operate.planted_run import plant

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 600) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_read_a_run(tmp_path: Path) -> None:
    printed = run("examples/read_a_run.py", str(plant(tmp_path / "run")))
    assert "desirable" in printed and "helpfulness" in printed


def test_judge_a_dataframe_is_short() -> None:
    text = (ROOT / "examples" / "judge_a_dataframe.py").read_text()
    code = [line for line in text.split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 12


@pytest.mark.e2e
def test_judge_a_dataframe() -> None:
    printed = run("examples/judge_a_dataframe.py")
    assert printed.count(" desirable ") == 2 and printed.count("undesirable") == 1
