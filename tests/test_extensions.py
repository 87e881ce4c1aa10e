"""The registry: how a user's file, an entry point and a name are found, and what happens when they are wrong."""

import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ray_pipeline import extensions
from ray_pipeline.data.prompts import PromptsConfig, source_digests
from ray_pipeline.data.sources import JsonlSource, PocketSource
from ray_pipeline.extensions import ExtensionError, digests_in, find, names, register
from ray_pipeline.workflow.registry import find_workflow
from tests.prompt_sets import load_prompts

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "my_source.py")
CHECKER = """
from ray_pipeline.extensions import register

@register("checker")
def even(prompt, response):
    return int(response) % 2 == 0
"""


def write(path: Path, text: str = CHECKER) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_that_registers_one_is_its_name(tmp_path):
    path = write(tmp_path / "mine.py")
    found = find("checker", path)
    assert found.name == "even" and found.value("q", "4") and found is find("checker", f"{path}:even")


def test_one_of_several_is_named(tmp_path):
    path = write(tmp_path / "mine.py", CHECKER + CHECKER.replace("even", "odd"))
    assert find("checker", f"{path}:odd").name == "odd"
    with pytest.raises(ExtensionError, match=r"registers several: even, odd; name one, for example .*mine\.py:even"):
        find("checker", path)
    with pytest.raises(ExtensionError, match="registers no checker 'third'; choose from even, odd"):
        find("checker", f"{path}:third")


def test_a_changed_file_is_another_digest_and_is_loaded_again(tmp_path):
    path = write(tmp_path / "mine.py")
    config = {"evaluate": [{"checker": path, "k": 4}]}
    before = digests_in(config)
    assert list(before) == ["extension mine.py"]
    write(tmp_path / "mine.py", CHECKER.replace("== 0", "== 1"))
    assert digests_in(config) != before and find("checker", path).value("q", "3")


def test_quorums_own_have_no_digest():
    assert find("source", "jsonl") and find_workflow("dmapo")
    assert digests_in({"type": "jsonl", "workflow": "dmapo"}) == {}
    assert digests_in({"type": "jsonl", "path": "none.py", "text": "a.py", "n": None}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"registers no checker; decorate one with @register"),
        ("1 / 0", r"mine\.py raised ZeroDivisionError: division by zero; fix the file"),
        ("def f(:", r"mine\.py raised SyntaxError"),
        ('from ray_pipeline.extensions import register\nregister("chequer")', "unknown kind of extension 'chequer'"),
    ],
)
def test_files_that_do_not_work(tmp_path, text, message):
    with pytest.raises(ExtensionError, match=message):
        find("checker", write(tmp_path / "mine.py", text))


def test_a_file_that_is_not_there():
    with pytest.raises(ExtensionError, match=r"cannot read .*none\.py .*available under it on every node"):
        find("checker", "none.py")


def test_a_relative_path_is_found_from_another_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert find("checker", "mine.py").name == "even"


def test_an_unknown_name_has_the_nearest():
    with pytest.raises(ExtensionError, match="unknown source 'josnl'; did you mean 'jsonl'"):
        find("source", "josnl")
    with pytest.raises(ExtensionError, match=r"unknown source 'elsewhere'; choose from .*huggingface"):
        find("source", "elsewhere")


def test_files_do_not_share_names(tmp_path):
    one = find("checker", write(tmp_path / "one.py"))
    two = find("checker", write(tmp_path / "two.py", CHECKER.replace("== 0", "== 1")))
    assert one.name == two.name and one.value("q", "2") and not two.value("q", "2")
    assert "even" not in names("checker")


def test_what_a_file_imports_registers_as_always():
    """A user's file may be the first that imports a room whose own extensions are registered there."""
    code = f"from ray_pipeline.extensions import find, names; find('source', {EXAMPLE!r}); print(names('source'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'pocket'" in done.stdout and "Sums" not in done.stdout


def test_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "their_package.py").write_text("def always(prompt, response):\n    return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("always", "their_package:always", "quorum.checkers")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == point.group else [])
    assert "always" in names("checker")
    assert find("checker", "always").value("q", "a") is True
    assert list(digests_in(["always"])) == ["extension always"]


def test_any_value_can_be_registered(monkeypatch):
    monkeypatch.setattr(extensions, "_registered", dict(extensions._registered))  # gone after the test
    marker = object()
    register("workflow", "marker")(marker)
    assert find("workflow", "marker").value is marker


# --- a prompt source in a user's file ---------------------------------------------------------------------------------


def test_the_example_source_gives_prompts():
    config = PromptsConfig.model_validate({"sources": [{"type": EXAMPLE, "below": 4}, {"type": "pocket", "count": 3}]})
    found = load_prompts(config, source_digests(config))
    assert found.counts["sources"]["my_source"]["kept"] == 10
    assert set(found.table["source"].to_pylist()) == {"my_source", "pocket"}
    assert list(source_digests(config)) == ["pocket"]
    assert config.model_dump(mode="json")["sources"][0] == {"type": EXAMPLE, "below": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": EXAMPLE, "below": 1}, "greater than or equal to 2"),
        ({"type": EXAMPLE, "above": 1}, "Extra inputs are not permitted"),
        ({"type": "sums"}, "unknown source 'sums'"),
        ("sums", "a source is a mapping with the key type"),
    ],
)
def test_a_source_that_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        PromptsConfig.model_validate({"sources": [values]})


def test_a_users_source_reaches_another_process():
    config = PromptsConfig.model_validate({"sources": [{"type": EXAMPLE, "below": 4}, {"type": "pocket", "count": 3}]})
    code = "import pickle, sys; config = pickle.load(sys.stdin.buffer); print(len(list(config.sources[0].rows())))"
    found = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True, check=True)
    assert found.stdout.split() == [b"10"]


def test_sources_survive_pickling_as_they_were():
    for source in (PocketSource(count=3), JsonlSource(path="a.jsonl", column="q")):
        again = pickle.loads(pickle.dumps(source))
        assert again == source and again.model_fields_set == source.model_fields_set | {"type"}
