"""The command line of `quorum submit`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_pipeline.cli.terminal import BAD_INPUT, DONE, STAGE_FAILED, chosen_config, complain
from ray_pipeline.config.loading import apply_override, read_yaml
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.store.outside import shown
from ray_pipeline.store.secrets import looks_like_key, names_secret_variable, redact, secret_in
from ray_pipeline.submit.job import CONFIG_FOLDER, ClusterLost, Ended, Job, SubmitError, run_job
from ray_pipeline.submit.named import Named, named_files
from ray_pipeline.submit.package import MAX_BYTES, PackageError, package
from ray_pipeline.workflow.registry import find_workflow

#: Exit code of a job that was stopped, or is no longer followed.
INTERRUPTED = 130
#: What Ray colours the names of processes with.
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
#: A private key whose end is not there yet.
_BEGUN_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?!(?s:.*)-----END )")
_LONGEST_KEY = 20_000  # characters; what begins like a key and goes on for longer is none


def submit(
    dag: Annotated[str, typer.Argument(help="workflow, as for `quorum run`")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, passed on to `quorum run`")] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="local YAML file, or the name of one that comes with Quorum; default: the workflow's own pocket "
            "configuration",
        ),
    ] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="run folder on the cluster: an absolute path that all nodes share, or a URI")
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="rerun this stage (name or number) and everything downstream")
    ] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage (name or number)")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="stop gracefully once total spend across sessions reaches this amount")
    ] = None,
    device_hour: Annotated[float | None, typer.Option(help="price of one GPU for an hour, for --max-cost")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="as of `quorum run`")] = False,
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
        config = chosen_config(find_workflow(dag), None) if config is None else config
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
        command += [*(["--quiet"] if quiet else []), *(["--log-json"] if log_json else [])]
        _refuse_keys(command)
        job = Job(
            command,
            name=base_name(run_dir) if run_dir else Path(config_name).stem,
            env=_environment(env),
            resources={k: _amount(k, v) for k, v in _pairs(driver_resource, "--driver-resource").items()},
            labels=_pairs(driver_label, "--driver-label"),
        )
        for line in [*packed.contents(), *chosen.notes()]:
            complain(line)
        complain(f"submitting to {address}")
        log = JobLog()
        try:
            ended = run_job(
                address, job, packed, extra_files=extra, resubmits=resubmit, wait=wait, say=complain, write=log.write
            )
        finally:
            log.close()
    except (PackageError, SubmitError, ConfigError, UnreachableFolder, StoreError) as error:
        complain(error)
        raise typer.Exit(BAD_INPUT) from error
    except ClusterLost as error:
        complain(f"{error}. Finished work is kept; rerun the same command to resume")
        raise typer.Exit(STAGE_FAILED) from error
    except KeyboardInterrupt:
        complain("stopped following; the job continues. Use `ray job stop` to stop it; its log is in the dashboard")
        raise typer.Exit(INTERRUPTED) from None
    if wait:
        raise typer.Exit(exit_code(ended))


def exit_code(ended: Ended) -> int:
    """The job's own exit code, or the one for its final status."""
    if ended.status == "SUCCEEDED":
        return DONE
    if ended.status == "STOPPED":
        complain("the job was stopped; rerun the same command to resume")
        return INTERRUPTED
    if ended.exit_code is None or ended.was_cut_off:
        last = ended.message.splitlines()[-1] if ended.message else "no reason given"
        complain(f"the job was interrupted: {last}. Rerun the same command to resume")
    if module := ended.missing_module:
        complain(
            f"the cluster's `python` has no package {module!r}. Start Ray on every node from the environment that has "
            "Quorum (cluster/install.sh, or the images of cluster/docker); for code of your own, `git add` the file or "
            "set --working-dir"
        )
    return ended.exit_code if ended.exit_code is not None and ended.exit_code > 0 else STAGE_FAILED


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


class JobLog:
    """A job's log on this terminal, by whole lines and whole private keys, so that no key is cut in two: without keys
    and colours, and with other control characters visible. Of a progress bar that overwrites its line, the last state
    is shown."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> None:
        text = self._rest + text
        end = text.rfind("\n") + 1
        begun = _BEGUN_KEY.search(text, 0, end)
        if begun and end - begun.start() < _LONGEST_KEY:
            end = text.rfind("\n", 0, begun.start()) + 1
        self._rest = text[end:]
        self._print(text[:end])

    def close(self) -> None:
        """Write what is left, such as an unfinished last line."""
        self._print(self._rest)
        self._rest = ""

    def _print(self, text: str) -> None:
        # Some keys have several lines, so keys are removed before the text is split.
        for line in re.findall(r"[^\n]*\n|[^\n]+", redact(_COLOURS.sub("", text.replace("\r\n", "\n")))):
            sys.stdout.write(shown(line.rstrip("\r").rpartition("\r")[2]))
        sys.stdout.flush()
