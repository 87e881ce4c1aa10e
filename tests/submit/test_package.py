"""What of a working directory goes to a cluster, and what must not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ray_pipeline.submit.package import PackageError, package

ROOT = Path(__file__).parents[2]


def lay_out(root: Path, *names: str, content: str = "x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture(params=["plain", "git"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A working directory with everything that must stay behind; also as a git checkout without a .gitignore."""
    root = tmp_path / "tree"
    lay_out(
        root,
        "configs/mine.yaml",
        "prompts.jsonl",
        "ray_pipeline/cli.py",
        "ray_pipeline/pocket/weights/judge/model.safetensors",
        "runs/pocket/manifest.json",
        "elsewhere/run/manifest.json",
        "elsewhere/run/config.yaml",
        "elsewhere/run/policy/adapter/adapter_config.json",
        "my-env/pyvenv.cfg",
        "my-env/lib/python/site.py",
        ".venv/bin/python",
        "ray_pipeline/__pycache__/cli.pyc",
        "models/mistral/model-00001.safetensors",
        "checkpoint-20/optimizer.json",
        ".env",
        ".pytest_cache/v",
    )
    if request.param == "git":
        subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


KEPT = [
    "configs/mine.yaml",
    "prompts.jsonl",
    "ray_pipeline/cli.py",
    "ray_pipeline/pocket/weights/judge/model.safetensors",
]


def test_code_and_configs_go_and_runs_environments_caches_weights_and_keys_stay(tree: Path) -> None:
    assert sorted(package(tree).sizes) == sorted(KEPT)


def test_what_git_ignores_stays_and_what_it_tracks_goes_all_the_same(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", "data/big.jsonl", "data/small.jsonl")
    (tmp_path / ".gitignore").write_text("data/\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", "data/small.jsonl"], check=True)
    assert sorted(package(tmp_path).sizes) == [".gitignore", "code.py", "data/small.jsonl"]


def test_a_file_that_git_tracks_and_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", "gone.py")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    (tmp_path / "gone.py").unlink()
    assert sorted(package(tmp_path).sizes) == ["code.py"]


@pytest.mark.parametrize("pattern", ["configs/", "configs", "configs/*.yaml", "mine.yaml"])
def test_a_pattern_of_the_user_leaves_more_out(tree: Path, pattern: str) -> None:
    assert sorted(package(tree, [pattern]).sizes) == sorted(set(KEPT) - {"configs/mine.yaml"})


def test_a_package_over_the_limit_names_its_largest_parts_and_the_remedy(tmp_path: Path) -> None:
    lay_out(tmp_path, "data/a/x.jsonl", content="x" * 3000)
    lay_out(tmp_path, "code.py", content="x" * 10)
    found = package(tmp_path)
    assert found.bytes == 3010
    found.check(3010)
    with pytest.raises(PackageError, match=r"largest parts are data/a .*--exclude"):
        found.check(3009)


def test_an_empty_or_missing_working_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="has no files"):
        package(tmp_path).check()
    with pytest.raises(PackageError, match="no folder"):
        package(tmp_path / "no")


def test_the_copy_is_what_was_chosen(tree: Path, tmp_path: Path) -> None:
    (tree / "configs/mine.yaml").chmod(0o755)
    package(tree).copy_to(tmp_path / "copy")
    copied = sorted(p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*") if p.is_file())
    assert copied == sorted(KEPT)
    assert (tmp_path / "copy/configs/mine.yaml").stat().st_mode & 0o111


def test_this_checkout_is_small_and_complete() -> None:
    found = package(ROOT)
    found.check()
    assert {"ray_pipeline/cli/run.py", "dags/dmapo.py", "configs/pocket.yaml"} <= set(found.sizes)
    assert any(
        name.startswith("ray_pipeline/pocket/weights/") and name.endswith(".safetensors") for name in found.sizes
    )
