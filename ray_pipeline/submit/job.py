"""A run as a Ray job: submit the package, follow its log, return its exit code, resubmit an interrupted job."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.submit.package import Package

#: Seconds without a response of the job server until the connection counts as lost.
PATIENCE_S = 60.0
#: Seconds that a lost head has to come back before an interrupted job is given up.
AGAIN_S = 10 * PATIENCE_S
#: Seconds between two requests.
POLL_S = 0.5

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
    """How a job ended. `exit_code` is the command's own; None if the job was ended from outside."""

    status: str
    exit_code: int | None
    message: str

    @property
    def was_cut_off(self) -> bool:
        """Whether the driver was killed or lost with its node, so that the same command resumes the run."""
        return self.status == "FAILED" and (self.exit_code is None or self.exit_code < 0 or self.exit_code >= 128)


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
        client, id_ = _accepted(address, job, package, extra_files or {}, patience_s=AGAIN_S if tries else 0.0)
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
    address: str, job: Job, package: Package, extra_files: Mapping[str, bytes], patience_s: float
) -> tuple[Any, str]:
    """A client, and the id under which the cluster accepted the job.

    Args:
        patience_s: seconds that a lost head and its agents have to come back.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            client, id_ = connect(address), submission_id(job.name)
            _submit(client, job, package, extra_files, id_)
            return client, id_
        except SubmitError:
            if time.monotonic() >= end:
                raise
            time.sleep(10 * POLL_S)


def connect(address: str) -> Any:
    """A client of the job server. Raises SubmitError if nothing responds there."""
    from ray.job_submission import JobSubmissionClient

    if not re.match(r"https?://", address):
        raise SubmitError(f"--address must be the dashboard's URL, for example http://HEAD:8265, not {address}")
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, OSError) as error:
        raise SubmitError(
            f"no job server responds at {address} ({str(error).splitlines()[0]}). Check that the cluster is up, with "
            "`ray[default]` on the head; from outside, open a tunnel first (`ray dashboard`, `kubectl port-forward`)"
        ) from error


def submission_id(name: str) -> str:
    """A new id that contains the run's name. A job server accepts each id only once."""
    return f"quorum-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}-{uuid.uuid4().hex[:8]}"


def _submit(client: Any, job: Job, package: Package, extra_files: Mapping[str, bytes], id_: str) -> None:
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
        except (RuntimeError, ValueError, OSError) as error:
            raise SubmitError(f"the cluster refused the job: {error}") from error


def follow(client: Any, id_: str, write: Callable[[str], None], patience_s: float = PATIENCE_S) -> Ended:
    """Write a job's log as it arrives and wait for its end.

    A broken log stream is resumed where it broke off; the job's state decides when it has ended, not the stream.

    Raises:
        ClusterLost: the job server did not respond for `patience_s`, or no longer has the job.
    """
    written = 0
    silent_since: float | None = None

    async def tail() -> None:
        nonlocal written
        skip = written
        async for text in client.tail_job_logs(id_):
            new, skip = text[skip:], max(0, skip - len(text))
            if new:
                written += len(new)
                write(new)

    while True:
        try:
            asyncio.run(tail())
        except Exception:  # The job's state, read next, distinguishes a hiccup from the end.
            time.sleep(POLL_S)
        try:
            info = client.get_job_info(id_)
            silent_since = None
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
            return Ended(str(info.status.value), info.driver_exit_code, (info.message or "").strip())
        time.sleep(POLL_S)


def _whole_log(client: Any, id_: str) -> str:
    try:
        return str(client.get_job_logs(id_))
    except Exception:  # The exit code matters more; the last lines of the log are in the dashboard.
        return ""
