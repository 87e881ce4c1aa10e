"""Values that must not move: keys, fingerprints, and the tables of a small run, compared with stored files.

A change of a key makes every stored call, candidate or prompt a stranger; a change of a fingerprint remakes stages of
stored runs; a change of a table means that the same run gives other data. Tests elsewhere compare such values with each
other, so that a change of all of them at once passes; here each is compared with what it was.

- `keys.json`: every function of `store/keys.py` on fixed inputs, and what engines are called in call keys.
- `fingerprints.json`: each stage of each configuration in `configs/`. Hub commits and files from outside the repository
  are replaced by fixed ones; the pocket weights and prompts are the real ones.
- `defaults.json`: the defaults of every class of settings that these fingerprints read. They are not in the
  fingerprints (`Settings.decisive`), so a new default remakes nothing unless the stages' `version` is raised.
- `tables.json`: SHA-256 of every table, dataset file and call of a run made by the real stages on scripted replies, and
  of a second one with planted scores. Hashes are of the schema and the rows, not of the Parquet bytes: these hold the
  version of pyarrow and the stage's fingerprint. The words of dataset cards are free.

If a golden changes on purpose, write the files again and say in a line of CHANGELOG.md what changed and what is remade:

    python -m tests.golden.test_goldens --write [keys] [fingerprints] [defaults] [tables]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic_core import to_jsonable_python

from ray_pipeline.bench import questions as benchmark_questions
from ray_pipeline.config.loading import read_config
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.dataset_rows import SPLITS, DatasetsConfig
from ray_pipeline.engines.base import Grammar, Sampling
from ray_pipeline.graph.stage import Stage
from ray_pipeline.pocket import WEIGHTS
from ray_pipeline.store import keys
from ray_pipeline.store.schemas import LABELS
from ray_pipeline.workflow.registry import find_workflow, workflow_names
from tests.golden.scripted_run import ScriptedRun, scripted_run
from tests.planted import random_world, write_run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDENS = ["keys", "fingerprints", "defaults", "tables"]

#: Shipped configuration → its workflow. A new file must be added here.
SHIPPED = {
    "ablations": "baselines",
    "agreement": "agreement",
    "baselines": "baselines",
    "benchmarks": "benchmarks",
    "dmapo": "dmapo",
    "endpoint": "dmapo",
    "endpoint_benchmarks": "benchmarks",
    "endpoint_winrate": "winrate",
    "fellowship": "fellowship",
    "fellowship_winrate": "winrate",
    "judge_check": "judge_check",
    "laptop": "dmapo",
    "pocket": "dmapo",
    "pocket_ablations": "baselines",
    "pocket_noise": "baselines",
    "pocket_posterior": "baselines",
    "pocket_rounds": "dmapo",
    "pocket_agreement": "agreement",
    "pocket_baselines": "baselines",
    "pocket_benchmarks": "benchmarks",
    "pocket_escalate": "dmapo",
    "pocket_fellowship": "fellowship",
    "pocket_judge_check": "judge_check",
    "pocket_train": "train",
    "pocket_winrate": "winrate",
    "smol": "dmapo",
    "smol_checklist": "dmapo",
    "smol_judge": "train",
    "smol_quick": "dmapo",
    "train": "train",
    "winrate": "winrate",
}


# --- keys -------------------------------------------------------------------------------------------------------------

ASCII = [{"role": "user", "content": "How many days has a leap year?"}]
UNICODE = [{"role": "user", "content": "Wie heißt «Cafe\u0301» auf Chinesisch? 咖啡馆 ☕ 👩‍🚀"}]
UNTIDY = [{"role": " User ", "content": "\r\n  a  b\u00a0c \t\r\n\r\n\r\n\r\n    code\u0000 \n"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is 2 + 2?"},
]
CONVERSATIONS = {"ascii": ASCII, "unicode": UNICODE, "untidy": UNTIDY, "talk": TALK, "empty": []}
PLAIN = Sampling()
SEEDED = Sampling(temperature=0.8, top_p=0.95, max_tokens=48, seed=1234567)
WHOLE_NUMBERS = Sampling(temperature=1, top_p=1, max_tokens=64, seed=0)
STOPPED = Sampling(stop=("\n\n", "é"), logprobs=20, extra=(("top_k", 40), ("min_p", 0.1)))
SAMPLINGS = {
    "plain": PLAIN,
    "seeded": SEEDED,
    "whole_numbers": WHOLE_NUMBERS,
    "stop_logprobs_extra": STOPPED,
    "choice": Sampling(grammar=Grammar.choice(["A", "B", "gleich – 同"])),
    "regex": Sampling(grammar=Grammar.regex(r"\d+")),
    "json": Sampling(grammar=Grammar.json({"type": "object", "properties": {"b": {}, "a": {"type": "integer"}}})),
}
IDENTITIES: dict[str, dict[str, Any]] = {
    "small": {"engine": "scripted", "model": "scripted"},
    "local": {
        "engine": "vllm",
        "model": "sha256:" + "ab" * 32,
        "adapter": "sha256:" + "cd" * 32,
        "dtype": "bfloat16",
        "quantization": None,
        "chat_template": None,
        "chat_template_args": {"enable_thinking": False},
        "args": {"max_model_len": 4096, "structured_outputs_config": {"backend": "xgrammar"}},
    },
    "hub": {"engine": "vllm", "model": "hub:owner/name@" + "0123456789" * 4, "dtype": "auto"},
    "endpoint": {"engine": "openai", "model": "endpoint:größe@https://host/v1", "structured": "auto", "omit": []},
}


def key_values() -> dict[str, dict[str, Any]]:
    """Function of `store/keys.py` → case → what it returns."""
    ids = {name: keys.prompt_id(messages) for name, messages in CONVERSATIONS.items()}
    plain = {"z": [1, 2.5, None, True, "é\u2028"], "a": {"n": -0.0, "big": 2**63, "small": 1e-7}}
    stage = ("gate", 3, {"tau": 2.5, "judges": ["a", "b"]})
    return {
        "canonical_json": {"plain": keys.canonical_json(plain)},
        "digest": {
            "plain": keys.digest(plain),
            "eight_bytes": keys.digest(plain, size=8),
            "text": keys.digest("é"),
            "list": keys.digest(["pair", "1", "2"]),
            "none": keys.digest(None),
            "surrogate": keys.digest("\ud83d"),
        },
        "normalise_text": {name: keys.normalise_text("".join(m["content"] for m in c)) for name, c in
                           CONVERSATIONS.items()},
        "normalise_messages": {name: keys.normalise_messages(c) for name, c in CONVERSATIONS.items()},
        "prompt_id": ids,
        "bucket_of": {name: keys.bucket_of(i) for name, i in ids.items()},
        "shard_of": {f"{name}/{n}": keys.shard_of(i, n) for name, i in ids.items() for n in (1, 8, 1024)},
        "candidate_id": {
            f"{who}/{how}/{k}": keys.candidate_id(ids["unicode"], IDENTITIES[who], SAMPLINGS[how].key(), k)
            for who in IDENTITIES
            for how in ("seeded", "stop_logprobs_extra")
            for k in (0, 3)
        },
        "derived_seed": {
            "candidate": keys.derived_seed("candidate", 0, ids["ascii"], 2),
            "retry": keys.derived_seed("retry", ids["unicode"], 1),
            "mixed": keys.derived_seed("é", 1.5, None, True, ["a"], {"b": 1}),
            "nothing": keys.derived_seed(),
        },
        "unit_hash": {
            "split": keys.unit_hash("split", 42, ids["ascii"]),
            "order": keys.unit_hash(0, ids["unicode"]),
            "nothing": keys.unit_hash(),
        },
        "call_key": {
            f"{who}/{said}/{how}": keys.call_key(IDENTITIES[who], CONVERSATIONS[said], SAMPLINGS[how].key())
            for who, said, how in (
                *((who, "ascii", "plain") for who in IDENTITIES),
                *(("local", said, "seeded") for said in CONVERSATIONS),
                *(("local", "talk", how) for how in SAMPLINGS),
            )
        },
        "fingerprint": {
            "bare": keys.fingerprint("prompts", 1, {}, {}, {}),
            "whole": keys.fingerprint(*stage, {"candidates": "0" * 16, "verdicts": "1" * 16}, {"file": "ab"}),
            "other_order": keys.fingerprint(*stage, {"verdicts": "1" * 16, "candidates": "0" * 16}, {"file": "ab"}),
            "no_config": keys.fingerprint("gate", 1, None, {}, {"é": "x"}),
        },
        "engine_identity": _engine_identities(),
    }  # fmt: skip


def _engine_identities() -> dict[str, Any]:
    """What the models of two shipped files are called in call keys."""
    found = {}
    for name in ("pocket", "endpoint"):
        models = _config(name).models
        for key in ("judge", *(["policy"] if name == "pocket" else [])):
            found[f"{name}/{key}"] = dict(models[key].factory()().identity)
    return found


# --- fingerprints -----------------------------------------------------------------------------------------------------


def _config(name: str) -> Any:
    workflow = SHIPPED[name]
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text("utf-8"))
    recorded = {"agreement": "data.path", "winrate": "data.path", "smol_judge": "preferences.path"}
    own = [f"{recorded[name]}=recorded.jsonl"] if name in recorded else []
    return read_config(find_workflow(workflow).config, values, own)


def wired(name: str, run_folder: str = "/runs/golden") -> list[Stage]:
    """The stages of a shipped configuration. Files and the hub must be replaced first (`outside_world`)."""
    return find_workflow(SHIPPED[name]).wire(_config(name), run_folder).stages


@contextlib.contextmanager
def outside_world(folder: Path) -> Iterator[None]:
    """Replace what is not in the repository: hub commits and files, packages, and a file of recorded rows."""
    import huggingface_hub

    def commit(_: Any, name: str, revision: str | None = None, **options: Any) -> Any:
        return SimpleNamespace(sha=hashlib.sha1(f"{name}@{revision or 'main'}".encode()).hexdigest())

    def download(repository: str, name: str, **options: Any) -> str:
        path = folder / "hub" / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{repository}/{name}\n")
        return str(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "model_info", commit)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", commit)
        patch.setattr(huggingface_hub, "hf_hub_download", download)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # A packaged model is installed or not, and its folder is made by a version of transformers.
        patch.setattr("ray_pipeline.engines.models.packaged_model", lambda name: f"packaged/{name.replace(':', '-')}")
        patch.setattr("ray_pipeline.engines.models.default_dtype", lambda: "auto")
        patch.setattr("ray_pipeline.data.programs.checker_digests", lambda reference: {"checkers": reference})
        patch.chdir(folder)
        (folder / "recorded.jsonl").write_text('{"item_id": "1"}\n')
        benchmark_questions._content.cache_clear()  # files of other tests
        try:
            yield
        finally:
            benchmark_questions._content.cache_clear()


def fingerprint_values() -> dict[str, dict[str, str]]:
    """Configuration → stage → fingerprint."""
    found: dict[str, dict[str, str]] = {}
    for name in SHIPPED:
        found[name] = {stage.name: stage.fingerprint for stage in wired(name)}
    return found


# --- defaults ---------------------------------------------------------------------------------------------------------


def default_values() -> dict[str, dict[str, Any]]:
    """Class of settings → key that fingerprints read → its default; keys without a default are left out."""
    reads: dict[type[Settings], set[str]] = {}
    decisive = Settings.decisive

    def noted(self: Settings, exclude: Collection[str] = ()) -> dict[str, Any]:
        reads.setdefault(type(self), set()).update({*type(self).model_fields} - {*exclude})
        return decisive(self, exclude)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "decisive", noted)
        for name in SHIPPED:
            wired(name)
    waiting = list(reads)
    while waiting:
        kind = waiting.pop()
        for key in reads[kind]:
            for inner in _blocks_in(kind.model_fields[key].annotation):
                if inner not in reads:  # a block that no shipped configuration has
                    reads[inner] = set(inner.model_fields)
                    waiting.append(inner)
    found: dict[str, dict[str, Any]] = {}
    for kind, names in reads.items():
        fields = {key: kind.model_fields[key] for key in names if not kind.model_fields[key].is_required()}
        if fields:
            assert kind.__name__ not in found, f"two classes of settings are called {kind.__name__}"
            found[kind.__name__] = {
                key: to_jsonable_python(field.get_default(call_default_factory=True)) for key, field in fields.items()
            }
    return found


def _blocks_in(annotation: Any) -> Iterator[type[Settings]]:
    """The classes of settings that a type names."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _blocks_in(part)


# --- tables -----------------------------------------------------------------------------------------------------------


def sha(value: Any) -> str:
    return hashlib.sha256(keys.canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def _columns(schema: pa.Schema) -> list[list[Any]]:
    return [[field.name, str(field.type), field.nullable] for field in schema]


def table_hash(parts: Sequence[Path]) -> dict[str, Any]:
    """Number of rows, and the hash of columns and rows in their order, file by file."""
    tables = [pq.read_table(part) for part in parts]
    content = [[_columns(table.schema), table.to_pylist()] for table in tables]
    return {"rows": sum(table.num_rows for table in tables), "sha256": sha(content)}


def folder_hashes(folder: Path, name: str) -> dict[str, Any]:
    """Hash of the shards or files of each table below a folder, and of the numbers in `stats.json`."""
    found: dict[str, Any] = {}
    for place in sorted({path.parent for path in folder.rglob("*.parquet")}):
        inside = place.relative_to(folder).as_posix()
        found[name if inside == "." else f"{name}/{inside}"] = table_hash(sorted(place.glob("*.parquet")))
    if (folder / "stats.json").exists():
        stats = json.loads((folder / "stats.json").read_text("utf-8"))
        numbers = {key: stats[key] for key in ("rows", "counts", "kto_weights", "gate", "judges")}
        found[f"{name}/stats.json"] = {"sha256": sha(numbers)}
    return found


def call_hashes(calls: Path) -> dict[str, Any]:
    """Role → number of calls, and the hash of their keys and replies."""
    roles: dict[str, set[tuple[str, str]]] = {}
    for part in calls.rglob("*.parquet"):
        for row in pq.read_table(part, columns=["role", "call_key", "text"]).to_pylist():
            roles.setdefault(row["role"], set()).add((row["call_key"], row["text"]))
    return {role: {"calls": len(found), "sha256": sha(sorted(found))} for role, found in sorted(roles.items())}


def scripted_values(run: ScriptedRun) -> dict[str, Any]:
    """Hashes of everything that a scripted run wrote, whatever its fingerprints are."""
    found: dict[str, Any] = {}
    for name, result in run.results.items():
        found |= folder_hashes(Path(result.folder), name)
    return {**found, "calls": call_hashes(run.calls)}


def planted_values(folder: Path) -> dict[str, Any]:
    """Hashes of a run on planted scores, some of them missing."""
    config = DatasetsConfig(kinds=["kto", "dpo", "sft"], max_length=60, max_prompt_length=20, rows_per_file=25)
    write_run(folder, random_world(60, seed=8), config=config)
    found: dict[str, Any] = {}
    for place in sorted(folder.iterdir()):
        found |= folder_hashes(place, place.name)
    return found


def table_values(scripted: ScriptedRun, folder: Path) -> dict[str, dict[str, Any]]:
    """Run → table → rows and hash; the planted run is made in an empty folder."""
    return {"scripted": scripted_values(scripted), "planted": planted_values(folder)}


# --- the tests --------------------------------------------------------------------------------------------------------

REMEDY = (
    "a golden changed. If that is meant, run `python -m tests.golden.test_goldens --write {name}` and say in "
    "CHANGELOG.md what changed and which stored work is remade"
)


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return found


def compare(name: str, found: dict[str, Any], kept: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(found))
    different = sorted(key for key in {*plain, *kept} if plain.get(key) != kept.get(key))
    changed = "\n".join(f"{key}: {kept.get(key)!r} → {plain.get(key)!r}" for key in different)
    assert not different, f"{REMEDY.format(name=name)}\n{changed}"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with outside_world(tmp_path_factory.mktemp("outside")):
        yield


@pytest.fixture(scope="module")
def all_keys(outside: None) -> dict[str, dict[str, Any]]:
    return key_values()


@pytest.fixture(scope="module")
def all_fingerprints(outside: None) -> dict[str, dict[str, str]]:
    return fingerprint_values()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> ScriptedRun:
    with contextlib.chdir(ROOT):
        return scripted_run(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def all_tables(scripted: ScriptedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return table_values(scripted, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("function", sorted(golden("keys")))
def test_keys_are_what_they_were(all_keys: dict[str, dict[str, Any]], function: str) -> None:
    compare("keys", all_keys[function], golden("keys")[function])


def test_every_function_of_keys_has_a_golden(all_keys: dict[str, dict[str, Any]]) -> None:
    public = {
        name
        for name, value in vars(keys).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == keys.__name__
    }
    # check_num_shards only refuses numbers, and an engine's identity is what it gives to call_key.
    assert (
        public - {"check_num_shards"}
        == set(all_keys) - {"engine_identity"}
        == set(golden("keys")) - {"engine_identity"}
    )


def test_every_shipped_configuration_has_a_golden() -> None:
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert files == set(SHIPPED) == set(golden("fingerprints"))
    assert set(SHIPPED.values()) == set(workflow_names())


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_fingerprints_are_what_they_were(all_fingerprints: dict[str, dict[str, str]], name: str) -> None:
    compare("fingerprints", all_fingerprints[name], golden("fingerprints")[name])


def test_a_new_key_with_a_default_changes_no_fingerprint(all_fingerprints: dict[str, dict[str, str]]) -> None:
    command = [sys.executable, "-m", "tests.golden.with_unused_keys"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == all_fingerprints


def test_defaults_are_what_they_were(outside: None) -> None:
    found, kept = default_values(), golden("defaults")
    moved = {
        f"{kind}.{key}"
        for kind in {*found} & {*kept}
        for key in {*found[kind]} & {*kept[kind]}
        if found[kind][key] != kept[kind][key]
    }
    assert not moved, (
        f"the defaults of {', '.join(sorted(moved))} changed, and no fingerprint holds a default: raise the `version` "
        "of the stages that read them, so that stored runs are remade, and add a line to CHANGELOG.md"
    )
    compare("defaults", found, kept)


def test_fingerprints_do_not_depend_on_the_place(outside: None) -> None:
    """Neither the folder of the package nor that of the run, nor the working folder, goes into a fingerprint."""
    found = set()
    for name in SHIPPED:
        here, there = (wired(name, folder) for folder in ("/runs/golden", "/elsewhere/other"))
        assert [stage.fingerprint for stage in here] == [stage.fingerprint for stage in there]
        for stage in here:
            text = keys.canonical_json([stage.config, dict(stage.external)])
            if any(place in text for place in (str(WEIGHTS), str(ROOT), os.getcwd(), "/runs/golden")):
                found.add((name, stage.name))
    assert not found


@pytest.mark.parametrize(("run", "table"), [(run, table) for run, found in golden("tables").items() for table in found])
def test_tables_are_what_they_were(all_tables: dict[str, dict[str, Any]], run: str, table: str) -> None:
    compare("tables", all_tables[run].get(table, {}), golden("tables")[run][table])


def test_every_table_has_a_golden(all_tables: dict[str, dict[str, Any]]) -> None:
    assert {run: set(found) for run, found in all_tables.items()} == {
        run: set(found) for run, found in golden("tables").items()
    }


def test_two_scripted_runs_are_the_same_bytes(
    scripted: ScriptedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goldens hash contents; the files of equal runs are equal to the byte as well."""
    monkeypatch.chdir(ROOT)

    def files(run: ScriptedRun) -> dict[str, bytes]:
        places = [Path(result.folder) for result in run.results.values()]
        return {
            str(path.relative_to(run.folder)): path.read_bytes()
            for place in places
            for path in place.rglob("*")
            if path.suffix in (".parquet", ".md") or path.name == "stats.json"
        }

    one, other = files(scripted), files(scripted_run(tmp_path))
    assert one == other and len(one) > 20


def test_the_scripted_run_has_every_case(scripted: ScriptedRun) -> None:
    """A golden of a run without a case would not notice a change of that case."""

    def values(stage: str, column: str) -> set[Any]:
        return set(scripted.results[stage].table().read_all()[column].to_pylist())

    assert values("gate", "label") == set(LABELS)
    assert values("prompts", "split") == {"train", "val"} and len(values("prompts", "task_type")) > 3
    assert values("candidates", "finish_reason") == {"stop", "length"} and "" in values("candidates", "response")
    assert {"ok", "unparsed"} <= values("judge", "parse_status") & values("critic", "parse_status")
    rows = golden("tables")["scripted"]
    assert all(rows[f"datasets/{kind}/{split}"]["rows"] > 0 for kind in ("kto", "dpo", "sft") for split in SPLITS)


# --- writing them -----------------------------------------------------------------------------------------------------


def write(names: Sequence[str]) -> None:
    """Write the named golden files from what the code does now."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name == "tables":
                with contextlib.chdir(ROOT):
                    run = scripted_run(Path(folder) / "scripted")
                values: Any = table_values(run, Path(folder) / "planted")
            else:
                with outside_world(Path(folder)):
                    made = {"keys": key_values, "fingerprints": fingerprint_values, "defaults": default_values}
                    values = made[name]()
            text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
            (HERE / f"{name}.json").write_text(text, "utf-8")
            print(f"wrote {HERE / name}.json")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.test_goldens", description="Write golden files.")
    parser.add_argument("--write", nargs="*", choices=GOLDENS, metavar="NAME", required=True)
    write(parser.parse_args(arguments).write or GOLDENS)


if __name__ == "__main__":
    main(sys.argv[1:])
