"""Following a job against a scripted job server: logs, ends, lost connections, and what the command returns."""

from __future__ import annotations

import http.server
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.cli.submit import JobLog, exit_code
from ray_pipeline.graph.reach import UnreachableFolder, check_location
from ray_pipeline.submit import job as jobs
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


class Dashboard:
    """A job server on loopback that answers every request with one status and text."""

    def __init__(self, status: int, text: str) -> None:
        asked = self.asked = []  # type: list[str]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Dashboard:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (401, "Unauthorized: Missing authentication token", "requires a token, and none was sent"),
        (403, "Forbidden: Invalid authentication token", "rejected the token"),
    ],
)
def test_a_cluster_with_tokens_is_explained_with_the_remedy(status: int, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x")
    with Dashboard(status, text) as server:
        arguments = ["submit", "dmapo", "--working-dir", str(tmp_path), "--address", server.url]
        result = CliRunner().invoke(app, arguments)
    output = " ".join(result.output.split())
    assert result.exit_code == 2, output
    assert told in output and "RAY_AUTH_MODE=token" in output and "RAY_AUTH_TOKEN" in output
    assert "Traceback" not in output and "AuthenticationError" not in output


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_typed_address_wins_over_the_environment_and_is_printed(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text("x")
    with Dashboard(500, "typed") as typed, Dashboard(500, "of the environment") as other:
        monkeypatch.setenv(variable, other.url)
        arguments = ["submit", "dmapo", "--working-dir", str(tmp_path), "--address", typed.url]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert typed.asked and not other.asked
    assert f"submitting to {typed.url}" in result.output and other.url not in result.output
    assert jobs.os.environ[variable] == other.url


def test_a_head_that_is_coming_up_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server([state(JobStatus.SUCCEEDED, 0)], [])
    accept, refusals = server.submit_job, ["No available agent to submit job, please try again later."] * 3

    def submit_job(**arguments: Any) -> str:
        if refusals:
            raise RuntimeError(f"Request failed with status code 500: {refusals.pop()}")
        return accept(**arguments)

    monkeypatch.setattr(server, "submit_job", submit_job)
    assert serve(monkeypatch, server)(tmp_path).status == "SUCCEEDED"
    assert len(server.submitted) == 1


def test_a_head_that_never_gets_an_agent_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, clock = Server([], []), iter(range(0, 10_000, 50))
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(clock)))
    error = RuntimeError("No available agent to submit job, please try again later.")
    monkeypatch.setattr(server, "submit_job", lambda **_: (_ for _ in ()).throw(error))
    with pytest.raises(SubmitError, match=r"no agent that starts jobs.*ray status"):
        serve(monkeypatch, server)(tmp_path)


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("ModuleNotFoundError: No module named 'typer'", "typer"),
        ("/usr/bin/python: No module named ray_pipeline", "ray_pipeline"),
        ("/usr/bin/python: Error while finding module specification for 'ray_pipeline.cli' "
         "(ModuleNotFoundError: No module named 'ray_pipeline')", "ray_pipeline"),
        ("ModuleNotFoundError: No module named 'my_lib.sub'", "my_lib"),
    ],
)  # fmt: skip
def test_a_package_that_the_cluster_lacks_is_named_with_the_remedy(
    line: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text("x")
    server = Server([state(JobStatus.FAILED, 1)], [["Traceback …\n", f"{line}\n"]])
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    result = CliRunner().invoke(app, ["submit", "dmapo", "--working-dir", str(tmp_path)])
    output = " ".join(result.output.split())
    assert result.exit_code == 1
    assert f"has no package {module!r}" in output and "cluster/install.sh" in output


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--env", "OPENAI_API_KEY=plain-secret"], "OPENAI_API_KEY"),
        (["--env", "HF_TOKEN=plain-secret"], "HF_TOKEN"),
        (["--env", "DB_PASSWORD=plain-secret"], "DB_PASSWORD"),
        (["--env", "HEADER=Bearer plain-secret-0123456789"], "HEADER"),
        (["--env", "COPY=known-secret-value"], "COPY"),
        (["models.judge.args.hf_token=plain-secret"], "models.judge.args.hf_token"),
        (["models.judge.endpoint.extra_body.note=sk-plain-secret-0123456789"], "extra_body.note"),
        (["--run-dir", "s3://AKIAAAAAAAAAAAAAAAAA:plain-secret@bucket/run"], "s3://"),
    ],
)
def test_no_key_is_sent_with_a_job(
    arguments: list[str], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text("x")
    monkeypatch.setenv("MY_API_KEY", "known-secret-value")
    server = Server([state(JobStatus.SUCCEEDED, 0)], [])
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    result = CliRunner().invoke(app, ["submit", "dmapo", "--working-dir", str(tmp_path), *arguments])
    assert result.exit_code == 2, result.output
    assert server.submitted == []
    output = " ".join(result.output.split())
    assert name in output and "environment" in output
    assert "plain-secret" not in output and "known-secret-value" not in output


def test_variables_that_are_no_keys_are_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x")
    server = Server([state(JobStatus.SUCCEEDED, 0)], [])
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    pairs = ["--env", "HF_HOME=/shared/hf", "--env", "TOKENIZERS_PARALLELISM=true"]
    assert CliRunner().invoke(app, ["submit", "dmapo", "--working-dir", str(tmp_path), *pairs]).exit_code == 0
    sent = server.submitted[0]["runtime_env"]["env_vars"]
    assert sent["HF_HOME"] == "/shared/hf" and sent["TOKENIZERS_PARALLELISM"] == "true"


def test_a_config_with_a_key_is_not_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x")
    (tmp_path / "mine.yaml").write_text("# sk-plain-secret-0123456789\nrun: {}\n")
    result = CliRunner().invoke(
        app, ["submit", "dmapo", "--working-dir", str(tmp_path), "-c", str(tmp_path / "mine.yaml")]
    )
    assert result.exit_code == 2 and "in a comment" in result.output and "plain-secret" not in result.output


def test_what_goes_and_what_stays_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "data").mkdir(parents=True)
    (tree / "code.py").write_text("x")
    (tree / "data/p.bin").write_text("x" * 1024)
    (tree / "job.yaml").write_text("prompts: {sources: [{path: data/p.bin}, {path: %s}]}" % (tmp_path / "abroad"))
    (tmp_path / "abroad").write_text("x")
    server = Server([state(JobStatus.SUCCEEDED, 0)], [])
    monkeypatch.setattr(jobs, "connect", lambda address: server)
    result = CliRunner().invoke(
        app, ["submit", "dmapo", "--working-dir", str(tree), "-c", str(tree / "job.yaml"), "--address", "http://h:1"]
    )
    assert result.exit_code == 0, result.output
    assert server.packed == [["code.py", "data/p.bin", "job.yaml"]]
    output = " ".join(result.output.split())
    assert "data/p.bin (1.0 KiB), named by the configuration" in output
    assert f"not packaged: {tmp_path / 'abroad'}, which prompts.sources.1.path names" in output.replace(" /", " /")
    assert "submitting to http://h:1" in output


def test_a_jobs_log_is_shown_by_lines_without_keys_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    log = JobLog()
    texts = "\x1b[36m(judge)\x1b[0m reads sk-abcd", "efgh12345678 now\n", "\x1b]0;title\x07\nstep 1\rstep 2\r\n", "e"
    for text in texts:
        log.write(text)
    assert capsys.readouterr().out == "(judge) reads *** now\n\\x1b]0;title\\x07\nstep 2\n"
    log.write("nd")
    log.close()
    assert capsys.readouterr().out == "end"
    for text in "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIEow", "IBAAKC\nqwertz\n", "-----END RSA PRIVATE KEY-----\nb\n":
        log.write(text)
    assert capsys.readouterr().out == "a\n***\nb\n"
    log.write("-----BEGIN PRIVATE KEY-----\nMIIEow\n")
    log.close()
    assert capsys.readouterr().out == "***"
