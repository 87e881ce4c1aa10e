"""The command line of `quorum submit`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_pipeline.config.loading import apply_override, read_yaml
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.store.outside import shown
from ray_pipeline.store.secrets import looks_like_key, names_secret_variable, redact, secret_in
from ray_pipeline.submit.job import CONFIG_FOLDER, ClusterLost, Ended, Job, SubmitError, run_job
from ray_pipeline.submit.named import Named, named_files
from ray_pipeline.submit.package import MAX_BYTES, PackageError, package

#: Exit codes of `quorum submit`, beside those of the job itself.
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_err = Console(stderr=True, soft_wrap=True)


def _say(text: str) -> None:
    _err.print(shown(f"quorum: {text}"), markup=False, highlight=False)


def submit(
    dag: Annotated[str, typer.Argument(help="workflow, as for `quorum run`")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, passed on to `quorum run`")] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="local YAML file, or the name of one that comes with Quorum")
    ] = "pocket",
    run_dir: Annotated[
        str | None, typer.Option(help="run folder on the cluster: an absolute path that all nodes share, or a URI")
    ] = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="rerun this stage and everything downstream")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="stop gracefully once total spend across sessions reaches this amount")
    ] = None,
    device_hour: Annotated[float | None, typer.Option(help="price of one GPU for an hour, for --max-cost")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="log as JSON lines, for log collectors")] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[str, typer.Option(help="folder to package: code, configs, prompt files")] = ".",
    exclude: Annotated[
        list[str] | None, typer.Option(help="further files to leave out (shell patterns: *, ?, [])")
    ] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="refuse a larger package")] = MAX_BYTES // 2**20,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME=value for every process of the job; a key is refused (cluster/README.md)"),
    ] = None,
    driver_label: Annotated[list[str] | None, typer.Option(help="required label=value of the driver's node")] = None,
    driver_resource: Annotated[list[str] | None, typer.Option(help="name=amount to reserve for the driver")] = None,
    resubmit: Annotated[int, typer.Option(min=0, help="maximum number of resubmissions after a lost driver")] = 0,
    wait: Annotated[bool, typer.Option(help="follow the log to the end and return the job's exit code")] = True,
) -> None:
    """Run a workflow as a job of a Ray cluster, or resume it: the same command does both.

    Packages what git tracks in the working directory and what the configuration names, never credentials, runs,
    environments, caches and weights.
    """
    from ray_pipeline.graph.reach import UnreachableFolder, check_location
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.store.locations import base_name

    try:
        if run_dir is not None:
            check_location(run_dir, "--run-dir")
        root = Path(working_dir).resolve()
        chosen = _Chosen.read(config, overrides or [], dag, root)
        packed = package(root, exclude or (), chosen.named.inside)
        packed.check(max_mib * 2**20)
        config_name, extra = chosen.place(packed.sizes)
        command = ["run", dag, "--config", config_name, *(overrides or [])]
        options: dict[str, str | float | None] = {"--run-dir": run_dir, "--from": from_stage, "--to": to_stage}
        options |= {"--max-cost": max_cost, "--device-hour": device_hour}
        for option, value in options.items():
            if value is not None:
                command += [option, str(value)]
        command += ["--log-json"] if log_json else []
        _refuse_keys(command)
        job = Job(
            command,
            name=base_name(run_dir) if run_dir else Path(config_name).stem,
            env=_environment(env),
            resources={k: _amount(k, v) for k, v in _pairs(driver_resource, "--driver-resource").items()},
            labels=_pairs(driver_label, "--driver-label"),
        )
        for line in [*packed.contents(), *chosen.notes()]:
            _say(line)
        _say(f"submitting to {address}")
        ended = run_job(address, job, packed, extra_files=extra, resubmits=resubmit, wait=wait, say=_say, write=_write)
    except (PackageError, SubmitError, ConfigError, UnreachableFolder, StoreError) as error:
        _say(str(error))
        raise typer.Exit(BAD_INPUT) from error
    except ClusterLost as error:
        _say(f"{error}. Finished work is kept; rerun the same command to resume")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        _say("stopped following; the job continues. Use `ray job stop` to stop it; its log is in the dashboard")
        raise typer.Exit(INTERRUPTED) from None
    if wait:
        raise typer.Exit(exit_code(ended))


def exit_code(ended: Ended) -> int:
    """The job's own exit code, or the one for its final status."""
    if ended.status == "SUCCEEDED":
        return DONE
    if ended.status == "STOPPED":
        _say("the job was stopped; rerun the same command to resume")
        return INTERRUPTED
    if ended.exit_code is None or ended.was_cut_off:
        last = ended.message.splitlines()[-1] if ended.message else "no reason given"
        _say(f"the job was interrupted: {last}. Rerun the same command to resume")
    if module := ended.missing_module:
        _say(
            f"the cluster's `python` has no package {module!r}. Start Ray on every node from the environment that has "
            "Quorum (cluster/install.sh, or the images of cluster/docker); for code of your own, `git add` the file or "
            "set --working-dir"
        )
    return ended.exit_code if ended.exit_code is not None and ended.exit_code > 0 else FAILED


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The configuration of the job: the typed name, the local file if it is one, and what it names."""

    name: str
    file: Path | None
    root: Path
    named: Named

    @classmethod
    def read(cls, config: str, overrides: list[str], workflow: str, root: Path) -> _Chosen:
        """Raises SubmitError or ConfigError: no such file, an invalid one, or one with a key in it."""
        path = Path(config).expanduser()
        file = path.resolve() if path.is_file() else None
        if file is None and path.suffix and path.parent != Path("."):
            raise SubmitError(f"no config file {config}; check --config")
        values: dict[str, Any] = {}
        try:
            values = read_yaml(str(path) if file else config)
        except ConfigError:
            if file is not None:  # a shipped one that does not exist here may exist in the package
                raise
        for override in overrides:
            apply_override(values, override)
        if problem := secret_in(values):
            raise SubmitError(f"{config}: {problem}")
        if file is not None and looks_like_key(file.read_text("utf-8")):
            raise SubmitError(f"{config} contains what looks like a key, in a comment; remove it")
        named = named_files(values, root, workflow)
        inside = (file.relative_to(root).as_posix(),) if file and file.is_relative_to(root) else ()
        return cls(config, file, root, dataclasses.replace(named, inside=(*inside, *named.inside)))

    def place(self, packed: Mapping[str, int]) -> tuple[str, dict[str, bytes]]:
        """The config's name in the package, and the file's content if it has to be added to the package."""
        if self.file is None:
            return self.name, {}
        if self.file.is_relative_to(self.root) and (inside := self.file.relative_to(self.root).as_posix()) in packed:
            return inside, {}
        name = f"{CONFIG_FOLDER}/{self.file.name}"
        return name, {name: self.file.read_bytes()}

    def notes(self) -> Iterator[str]:
        for key, path in self.named.elsewhere.items():
            yield f"not packaged: {path}, which {key} names; every node must have it at this path"


def _refuse_keys(command: Sequence[str]) -> None:
    """Raises SubmitError for a key in the command, which the cluster records and its dashboard shows."""
    for word in command:
        if looks_like_key(word):
            raise SubmitError(
                f"{redact(word)} contains what looks like a key, which the cluster records and its dashboard shows; "
                "set it in the environment of the nodes (cluster/README.md)"
            )


def _environment(texts: list[str] | None) -> dict[str, str]:
    """The pairs of --env. Raises SubmitError for a key: the cluster records the environment of a job."""
    pairs = _pairs(texts, "--env")
    for name, value in pairs.items():
        if value and (names_secret_variable(name) or redact(value) != value):
            raise SubmitError(
                f"--env {name} would send a key, which the cluster records and its dashboard shows; set {name} in the "
                "environment in which `ray start` runs on the nodes that need it (cluster/README.md)"
            )
    return pairs


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise SubmitError(f"{option} must be NAME=value, not {redact(text)!r}")
        pairs[name] = value
    return pairs


def _amount(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SubmitError(f"--driver-resource {name} must be a number, not {value!r}") from None


def _write(text: str) -> None:
    sys.stdout.write(redact(text))
    sys.stdout.flush()
