"""A run as a Ray job: submit the package, follow its log, return its exit code, resubmit an interrupted job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.submit.package import Package

#: Seconds without a response of the job server until the connection counts as lost.
PATIENCE_S = 60.0
#: Seconds that a lost head has to come back before an interrupted job is given up.
AGAIN_S = 10 * PATIENCE_S
#: Seconds that a head may take until it has an agent that starts jobs.
HEAD_S = 2 * PATIENCE_S
#: Seconds between two requests.
POLL_S = 0.5
#: Characters of the end of a job's log that its failure is explained from.
_TAIL = 4000

#: Folder of the package for a config file that lies outside the working directory.
CONFIG_FOLDER = "submitted-config"

#: Environment of every process of a run on a cluster.
JOB_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class SubmitError(ValueError):
    """The job cannot be submitted; the message names the problem and the fix."""


class HeadStarting(SubmitError):
    """The job server is up, but the head has no agent yet that starts jobs."""


class ClusterLost(RuntimeError):
    """The job server does not respond, or no longer has the job: the head is gone or was restarted."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job to run on the cluster.

    Attributes:
        command: arguments of `quorum`, for example ["run", "dmapo", "--config", "configs/dmapo.yaml", …].
        name: part of the submission id, which the dashboard shows.
        env: environment variables of every process of the job. Never API keys: the cluster records them.
        num_cpus: CPUs that the driver reserves.
        resources, labels: custom resources and node labels that the driver's node must have.
    """

    command: Sequence[str]
    name: str
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_cpus: float = 0.0
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "ray_pipeline.cli", *self.command])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        exit_code: the command's own; None if the job was ended from outside.
        tail: the end of its log.
    """

    status: str
    exit_code: int | None
    message: str
    tail: str = dataclasses.field(default="", compare=False)

    @property
    def was_cut_off(self) -> bool:
        """Whether the driver was killed or lost with its node, so that the same command resumes the run."""
        return self.status == "FAILED" and (self.exit_code is None or self.exit_code < 0 or self.exit_code >= 128)

    @property
    def missing_module(self) -> str | None:
        """The package that the cluster's Python lacks, if the job failed for it."""
        found = re.findall(r"No module named '?([A-Za-z_][\w.]*)", f"{self.tail}\n{self.message}")
        return found[-1].split(".")[0] if found and self.status == "FAILED" and not self.was_cut_off else None


def run_job(
    address: str,
    job: Job,
    package: Package,
    *,
    extra_files: Mapping[str, bytes] | None = None,
    resubmits: int = 0,
    wait: bool = True,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> Ended:
    """Submit a job and follow it to its end; resubmit it if it is interrupted, at most `resubmits` times.

    Args:
        address: URL of the job server, for example http://127.0.0.1:8265.
        extra_files: path in the package → content of files from outside the working directory.
        wait: if false, return as soon as the job is accepted.
        say: called with messages about the job.
        write: called with its log as it arrives.

    Raises:
        SubmitError: no job server responds at the address, or it refuses the job.
        ClusterLost: the connection was lost and did not come back.
    """
    tries = 0
    while True:
        client, id_ = _accepted(address, job, package, extra_files or {}, AGAIN_S if tries else 0.0, say)
        say(f"submitted {id_}: {job.entrypoint}")
        if not wait:
            return Ended("PENDING", None, "")
        try:
            ended = follow(client, id_, write)
        except ClusterLost as error:
            if tries >= resubmits:
                raise
            why = str(error)
        else:
            if not ended.was_cut_off or tries >= resubmits:
                return ended
            why = (ended.message or ended.status).splitlines()[-1]
        tries += 1
        say(f"{id_} was interrupted ({why}); resubmitting, {tries} of {resubmits}")


def _accepted(
    address: str,
    job: Job,
    package: Package,
    extra_files: Mapping[str, bytes],
    patience_s: float,
    say: Callable[[str], None],
) -> tuple[Any, str]:
    """A client, and the id under which the cluster accepted the job.

    Args:
        patience_s: seconds that a lost head has to come back. A head that is starting has at least `HEAD_S`.
    """
    begin = time.monotonic()
    waiting = False
    while True:
        try:
            client, id_ = connect(address), submission_id(job.name)
            _submit(client, job, package, extra_files, id_)
            return client, id_
        except SubmitError as error:
            starting = isinstance(error, HeadStarting)
            if time.monotonic() - begin >= (max(patience_s, HEAD_S) if starting else patience_s):
                raise
            if starting and not waiting:
                say(f"the cluster's head is still starting; retrying for up to {HEAD_S:.0f} s")
                waiting = True
            time.sleep(10 * POLL_S)


def connect(address: str) -> Any:
    """A client of the job server at exactly this address. Raises SubmitError if nothing responds there."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not re.match(r"https?://", address):
        raise SubmitError(f"--address must be the dashboard's URL, for example http://HEAD:8265, not {address}")
    try:
        with _without(*_ADDRESS_VARIABLES):  # to which Ray would give precedence over its argument
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(token_problem(address, error)) from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise SubmitError(
            f"no job server responds at {address} ({_first_line(error)}). Check that the cluster is up, with "
            "`ray[default]` on the head; from outside, open a tunnel first (`ray dashboard`, `kubectl port-forward`)"
        ) from error


#: Variables that Ray prefers to an address that is passed to it.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """This process without these environment variables while the block runs."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def token_problem(address: str, error: Exception) -> str:
    """What is wrong with the token of a cluster that has token authentication on, and the remedy."""
    if "401" in str(error) or "required" in str(error):
        problem = f"the cluster at {address} requires a token, and none was sent"
    else:
        problem = f"the cluster at {address} rejected the token"
    return (
        f"{problem}. Set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in the file that "
        "RAY_AUTH_TOKEN_PATH names (default: ~/.ray/auth_token). `ray get-auth-token` on the head prints it; "
        "cluster/README.md has the command for each kind of cluster"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def submission_id(name: str) -> str:
    """A new id that contains the run's name. A job server accepts each id only once."""
    return f"quorum-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}-{uuid.uuid4().hex[:8]}"


def _submit(client: Any, job: Job, package: Package, extra_files: Mapping[str, bytes], id_: str) -> None:
    from ray.exceptions import AuthenticationError

    # The chosen files are copied to a separate folder, so that exactly the checked files are uploaded. Ray would apply
    # .gitignore again, and so drop files that git tracks although they match it.
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="quorum-submit-") as folder:
        package.copy_to(Path(folder))
        for name, content in extra_files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=id_,
                runtime_env={"working_dir": folder, "env_vars": {**JOB_ENV, **job.env}},
                metadata={"quorum": job.name},
                entrypoint_num_cpus=job.num_cpus,
                entrypoint_resources=dict(job.resources) or None,
                entrypoint_label_selector=dict(job.labels) or None,
            )
        except AuthenticationError as error:
            raise SubmitError(token_problem("the address", error)) from error
        except (RuntimeError, ValueError, OSError) as error:
            if "No available agent" in str(error):
                raise HeadStarting(
                    "the cluster's head has no agent that starts jobs; check on the head that `ray status` lists it "
                    "and that `ray[default]` is installed there, then rerun"
                ) from error
            raise SubmitError(f"the cluster refused the job: {error}") from error


def follow(client: Any, id_: str, write: Callable[[str], None], patience_s: float = PATIENCE_S) -> Ended:
    """Write a job's log as it arrives and wait for its end.

    A broken log stream is resumed where it broke off; the job's state decides when it has ended, not the stream.

    Raises:
        ClusterLost: the job server did not respond for `patience_s`, or no longer has the job.
    """
    from ray.exceptions import AuthenticationError

    written, end = 0, ""
    silent_since: float | None = None

    async def tail() -> None:
        nonlocal written, end
        skip = written
        async for text in client.tail_job_logs(id_):
            new, skip = text[skip:], max(0, skip - len(text))
            if new:
                written, end = written + len(new), (end + new)[-_TAIL:]
                write(new)

    while True:
        try:
            asyncio.run(tail())
        except Exception:  # The job's state, read next, distinguishes a hiccup from the end.
            time.sleep(POLL_S)
        try:
            info = client.get_job_info(id_)
            silent_since = None
        except AuthenticationError as error:
            raise ClusterLost(f"cannot follow {id_}: {token_problem('this address', error)}") from error
        except Exception as error:
            if "does not exist" in str(error) or "404" in str(error):
                raise ClusterLost(f"the cluster no longer has {id_}: its head was restarted") from error
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > patience_s:
                raise ClusterLost(f"the cluster has not responded for {patience_s:.0f} s about job {id_}") from error
            time.sleep(POLL_S)
            continue
        if info.status.is_terminal():
            rest = _whole_log(client, id_)[written:]
            if rest:
                write(rest)
            message = (info.message or "").strip()
            return Ended(str(info.status.value), info.driver_exit_code, message, (end + rest)[-_TAIL:])
        time.sleep(POLL_S)


def _whole_log(client: Any, id_: str) -> str:
    try:
        return str(client.get_job_logs(id_))
    except Exception:  # The exit code matters more; the last lines of the log are in the dashboard.
        return ""
