"""Following a job against a scripted job server: logs, ends, lost connections, and what the command returns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.graph.reach import UnreachableFolder, check_location
from ray_pipeline.submit import job as jobs
from ray_pipeline.submit.command import exit_code
from ray_pipeline.submit.job import ClusterLost, Ended, Job, SubmitError, follow, run_job, submission_id
from ray_pipeline.submit.package import Package


class Server:
    """A job client whose answers are given. `tails`: what each log stream says before it breaks off or ends."""

    def __init__(self, infos: list[Any], tails: list[list[str] | Exception], log: str = "") -> None:
        self.infos, self.tails, self.log = infos, tails, log
        self.submitted: list[dict[str, Any]] = []
        self.packed: list[list[str]] = []

    async def tail_job_logs(self, id_: str) -> AsyncIterator[str]:
        for text in self.tails.pop(0) if self.tails else []:
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_info(self, id_: str) -> Any:
        info = self.infos.pop(0)
        if isinstance(info, Exception):
            raise info
        return info

    def get_job_logs(self, id_: str) -> str:
        return self.log

    def submit_job(self, **arguments: Any) -> str:
        folder = Path(arguments["runtime_env"]["working_dir"])
        self.packed.append(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
        self.submitted.append(arguments)
        return arguments["submission_id"]


def state(status: JobStatus, code: int | None = None, message: str = "") -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message)


RUNNING = state(JobStatus.RUNNING)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", raising=False)


def heard(server: Server, **kwargs: Any) -> tuple[Ended, str]:
    lines: list[str] = []
    return follow(server, "id", lines.append, **kwargs), "".join(lines)


def test_a_log_stream_that_breaks_off_is_taken_up_where_it_was() -> None:
    whole = "one\ntwo\nthree\n"
    server = Server(
        [RUNNING, state(JobStatus.SUCCEEDED, 0)],
        [["one\nt", RuntimeError("closed")], ["one\n", "two\n"]],  # type: ignore[list-item]
        log=whole,
    )
    ended, log = heard(server)
    assert log == whole
    assert ended == Ended("SUCCEEDED", 0, "")


def test_a_server_that_is_silent_for_a_while_is_asked_again() -> None:
    server = Server([ConnectionError("no"), RUNNING, state(JobStatus.FAILED, 2, "exit 2")], [])
    assert heard(server)[0].exit_code == 2


def test_a_server_that_stays_silent_and_one_that_forgot_the_job_are_told_apart() -> None:
    with pytest.raises(ClusterLost, match="has not responded"):
        heard(Server([ConnectionError("no")] * 9, []), patience_s=0.0)
    with pytest.raises(ClusterLost, match="restarted"):
        heard(Server([RuntimeError("Job id does not exist")], []))


@pytest.mark.parametrize(
    ("ended", "code", "cut_off"),
    [
        (Ended("SUCCEEDED", 0, ""), 0, False),
        (Ended("FAILED", 1, "a stage failed"), 1, False),
        (Ended("FAILED", 2, "bad input"), 2, False),
        (Ended("FAILED", None, "the supervisor died"), 1, True),
        (Ended("FAILED", -9, "killed"), 1, True),
        (Ended("FAILED", 137, "killed in a shell"), 137, True),
        (Ended("STOPPED", None, ""), 130, False),
    ],
)
def test_the_exit_code_is_the_jobs_own(ended: Ended, code: int, cut_off: bool) -> None:
    assert exit_code(ended) == code
    assert ended.was_cut_off is cut_off


def serve(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[..., Ended]:
    monkeypatch.setattr(jobs, "connect", lambda address: server)

    def run(tmp_path: Path, **kwargs: Any) -> Ended:
        (tmp_path / "a b.py").write_text("x")
        job = Job(["run", "dmapo", "gate.tau=2 ; rm"], "my run", env={"A": "1"})
        package = Package(tmp_path, {"a b.py": 1})
        said: list[str] = []
        return run_job("http://x:1", job, package, say=said.append, write=said.append, **kwargs)

    return run


def test_what_was_cut_off_is_submitted_again_under_a_new_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([state(JobStatus.FAILED, -9), RuntimeError("does not exist"), state(JobStatus.SUCCEEDED, 0)], [])
    ended = serve(monkeypatch, server)(tmp_path, resubmits=2, extra_files={"submitted-config/c.yaml": b"x"})
    assert ended.status == "SUCCEEDED"
    assert len({s["submission_id"] for s in server.submitted}) == 3
    assert server.packed == [["a b.py", "submitted-config/c.yaml"]] * 3
    first = server.submitted[0]
    assert first["entrypoint"] == "python -m ray_pipeline.cli run dmapo 'gate.tau=2 ; rm'"
    assert first["runtime_env"]["env_vars"]["A"] == "1"


def test_a_stage_that_failed_is_not_submitted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([state(JobStatus.FAILED, 1)], [])
    assert serve(monkeypatch, server)(tmp_path, resubmits=5).exit_code == 1
    assert len(server.submitted) == 1


def test_a_submission_id_says_whose_it_is_and_is_new_each_time() -> None:
    assert submission_id("my run/7").startswith("quorum-my-run-7-")
    assert submission_id("a") != submission_id("a")


@pytest.mark.parametrize("location", ["/shared/runs/a", "s3://bucket/runs/a", "~/runs/a", "gs://b/r"])
def test_a_jobs_run_folder_may_be_a_whole_path_or_a_uri(location: str) -> None:
    check_location(location, "--run-dir")


def test_a_relative_run_folder_is_refused_with_the_remedy() -> None:
    with pytest.raises(UnreachableFolder, match=r"--run-dir is 'runs/a'.*absolute path.*s3://bucket/runs/a"):
        check_location("runs/a", "--run-dir")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run-dir", "runs/a"], "must be an absolute path"),
        (["--working-dir", "/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["--config", "no/such.yaml"], "no config file no/such.yaml"),
        (["--env", "TOKEN"], "--env must be NAME=value"),
        (["--driver-resource", "driver=much"], "--driver-resource driver must be a number"),
        (["--address", "head:8265"], "--address must be the dashboard's URL"),
        (["--address", "http://127.0.0.1:9"], "no job server responds at http://127.0.0.1:9"),
    ],
)
def test_what_is_wrong_here_is_said_before_anything_is_sent(arguments: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x")
    result = CliRunner().invoke(app, ["submit", "dmapo", "--working-dir", str(tmp_path), *arguments])
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())


def test_a_config_outside_the_working_directory_goes_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "code.py").write_text("x")
    (tmp_path / "mine.yaml").write_text("run: {}")
    server = Server([state(JobStatus.SUCCEEDED, 0)], [["hello\n"]])
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    arguments = ["submit", "dmapo", "a=1", "-c", str(tmp_path / "mine.yaml"), "--working-dir", str(tree)]
    result = CliRunner().invoke(app, [*arguments, "--run-dir", "s3://b/run", "--to", "gate"])
    assert result.exit_code == 0, result.output
    assert "hello" in result.output
    assert server.packed == [["code.py", "submitted-config/mine.yaml"]]
    command = (
        "python -m ray_pipeline.cli run dmapo --config submitted-config/mine.yaml a=1 --run-dir s3://b/run --to gate"
    )
    assert server.submitted[0]["entrypoint"] == command


def test_a_job_server_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([], [])
    monkeypatch.setattr(server, "submit_job", lambda **_: (_ for _ in ()).throw(RuntimeError("no such label")))
    with pytest.raises(SubmitError, match="refused the job: no such label"):
        serve(monkeypatch, server)(tmp_path)
