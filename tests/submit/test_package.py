"""What of a working directory goes to a cluster, and what must not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.submit.named import named_files
from ray_pipeline.submit.package import PackageError, is_secret, package

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
        track(root)
    return root


def track(root: Path, *names: str) -> None:
    """A git checkout that tracks these files, or all of them."""
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", "-f", *(names or ["."])], check=True)


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
    track(tmp_path, "data/small.jsonl", ".gitignore", "code.py")
    assert sorted(package(tmp_path).sizes) == [".gitignore", "code.py", "data/small.jsonl"]


def test_a_file_that_git_tracks_and_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", "gone.py")
    track(tmp_path)
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


CREDENTIALS = [
    ".ssh/id_ed25519",
    ".ssh/config",
    ".aws/credentials",
    ".aws/config",
    ".netrc",
    "sub/.netrc",
    "hf_token",
    "sub/hf_token",
    "quorum.env",
    ".env",
    ".env.local",
    "key.pem",
    "certs/server.key",
    "id_rsa",
    "id_rsa.pub",
    "secrets.yaml",
    "gcp/service-account-prod.json",
    ".git-credentials",
    ".kube/config",
    ".docker/config.json",
    "wandb_api_key.txt",
    "token.txt",
    ".huggingface/token",
    ".ray/auth_token",
    "secrets/openai.yaml",
    "credentials/prod.txt",
    "kaggle.json",
    ".kaggle/kaggle.json",
    "openai_key.txt",
    "deploy-key",
    "infra/prod.tfvars",
    "infra/terraform.tfstate",
    "rclone.conf",
]


@pytest.mark.parametrize("git", [True, False])
def test_credentials_stay_even_if_git_tracks_them(git: bool, tmp_path: Path) -> None:
    code = ["code.py", "tests/test_tokenizer.py", "model/tokenizer.json", "store/secrets.py", "secrets/vault.py"]
    lay_out(tmp_path, *code, *CREDENTIALS)
    if git:
        track(tmp_path)
    found = package(tmp_path)
    assert sorted(found.sizes) == sorted(code)
    told = "\n".join(found.contents())
    assert not git or ".aws/credentials, .docker/config.json" in told


@given(st.sampled_from(CREDENTIALS), st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), max_size=3), st.booleans())
def test_credentials_are_known_at_any_depth_and_in_any_case(name: str, folders: list[str], upper: bool) -> None:
    path = "/".join([*folders, name.upper() if upper else name])
    assert is_secret(path)


@pytest.mark.parametrize("name", CREDENTIALS)
def test_a_credential_that_the_configuration_names_is_refused(name: str, tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", name)
    with pytest.raises(PackageError, match="credentials"):
        package(tmp_path, named=[name])


def test_untracked_files_stay_and_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", "new.py", "runs/a.txt")
    track(tmp_path, "code.py")
    found = package(tmp_path)
    assert sorted(found.sizes) == ["code.py"]
    assert any("new.py" in line and "git add" in line and "runs" not in line for line in found.contents())


def test_a_checkout_that_tracks_nothing_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(PackageError, match="git add"):
        package(tmp_path)


def test_ignored_files_that_the_configuration_names_go_and_are_said_with_their_size(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", "data/p.jsonl", "model/config.json", "model/w.safetensors", content="x" * 2048)
    (tmp_path / ".gitignore").write_text("data/\nmodel/\n")
    track(tmp_path, "code.py", ".gitignore")
    found = package(tmp_path, named=["data/p.jsonl", "model"])
    assert sorted(found.sizes) == [".gitignore", "code.py", "data/p.jsonl", "model/config.json", "model/w.safetensors"]
    told = "\n".join(found.contents())
    assert "data/p.jsonl (2.0 KiB), named by the configuration" in told and "model/w.safetensors" in told
    fewer = package(tmp_path, exclude=["w.safetensors"], named=["data/p.jsonl", "model"])
    assert "model/w.safetensors" not in fewer.sizes and "credentials" not in " ".join(fewer.contents())


def test_submodules_go_and_one_that_is_not_checked_out_is_named(tmp_path: Path) -> None:
    library, tree = tmp_path / "library", tmp_path / "tree"
    lay_out(library, "lib.py")
    track(library)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(library), *identity, "commit", "-qm", "x"], check=True)
    lay_out(tree, "code.py")
    track(tree)
    for name in ("vendor", "absent"):
        subprocess.run(
            ["git", "-C", str(tree), *identity, "submodule", "--quiet", "add", str(library), name], check=True
        )
    subprocess.run(["git", "-C", str(tree), "submodule", "--quiet", "deinit", "-f", "absent"], check=True)
    found = package(tree)
    assert sorted(found.sizes) == [".gitmodules", "code.py", "vendor/lib.py"]
    assert any("absent" in line and "submodule update" in line for line in found.contents())


@pytest.mark.parametrize("git", [True, False])
def test_no_link_leads_out_of_the_folder_and_links_inside_are_followed(git: bool, tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    lay_out(outside, "private.txt", "deep/more.txt")
    lay_out(tree, "code.py", "shared/part.py", ".env")
    (tree / "out.txt").symlink_to(outside / "private.txt")
    (tree / "out").symlink_to(outside)
    (tree / "gone.txt").symlink_to(tmp_path / "nothing")
    (tree / "notes.txt").symlink_to(tree / ".env")
    (tree / "linked").symlink_to("shared")
    (tree / "loop").symlink_to(".")
    (tree / "alias.py").symlink_to("code.py")
    if git:
        track(tree)
    found = package(tree)
    kept = {"alias.py", "code.py", "linked/part.py", "shared/part.py", "loop/code.py", "loop/shared/part.py"}
    assert set(found.sizes) == kept
    told = "\n".join(found.contents())
    assert "gone.txt, out, out.txt, a link out of the working directory" in told and "notes.txt" in told
    found.copy_to(tmp_path / "copy")
    assert not [p for p in (tmp_path / "copy").rglob("*") if p.is_symlink()]
    for name in ("out.txt", "out", "out/deep/more.txt"):
        with pytest.raises(PackageError, match="by a link"):
            package(tree, named=[name])


def test_a_rayignore_that_ray_would_follow_silently_stays(tmp_path: Path) -> None:
    lay_out(tmp_path, "code.py", ".rayignore")
    track(tmp_path)
    assert sorted(package(tmp_path).sizes) == ["code.py"]


def test_what_a_configuration_names(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    lay_out(tree, "data/a.jsonl", "data/b.jsonl", "my_judge.py", "model/config.json", "policy/x.py", "runs/old/x")
    lay_out(tmp_path, "abroad/big.jsonl")
    values = {
        "run": {"root": "runs"},
        "calls": {"root": "data"},
        "models": {"policy": {"model": "model"}, "other": {"model": "owner/name"}},
        "candidates": {"model": "policy"},
        "prompts": {"sources": [{"path": "data/*.jsonl"}, {"path": str(tmp_path / "abroad/big.jsonl")}]},
        "ask": {"strategies": [{"kind": "my_judge.py:Mine"}]},
        "text": "a\nb",
        "odd": "\0",
    }
    found = named_files(values, tree, "my_workflow.py")
    assert set(found.inside) == {"model", "data/a.jsonl", "data/b.jsonl", "my_judge.py"}
    assert found.elsewhere == {"prompts.sources.1.path": str(tmp_path / "abroad/big.jsonl")}
    with pytest.raises(PackageError, match=r"prompts.path names \.\./abroad/big.jsonl, which is outside"):
        named_files({"prompts": {"path": "../abroad/big.jsonl"}}, tree)
