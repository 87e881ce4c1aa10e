"""Warm workers; a tokenizer with a chat template, made on the spot; IFEval's official checkers where they can run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ray_pipeline.constraints.official import Checkers, checkers
from ray_pipeline.engines import core_server
from ray_pipeline.engines.warm import WarmPython
from tests.published import nltk_data

# Ray workers, engines and commands inherit this: without bytecode, each of them compiles all of Quorum at its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Ray gives its workers a niceness of 15: beside another test's engine on the same cores they would stand still.
os.environ.setdefault("RAY_worker_niceness", "0")
# No machine of these tests is preempted, and a process that waits for it takes 2 s of CPU time to start.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

REPOSITORY = Path(__file__).parents[1]

# A busy machine says nothing about the code.
settings.register_profile("quorum", deadline=None)
settings.load_profile("quorum")


def pytest_configure(config: pytest.Config) -> None:
    """Light tests compute in one thread: xdist's workers share the cores, and small matrices only wait for threads."""
    if config.getoption("markexpr") == "not e2e":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, with the tests


@pytest.fixture(scope="session", autouse=True)
def _imports_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray workers and engines of end-to-end tests, and of commands that they run, are forked from one server."""
    if any(item.get_closest_marker("e2e") for item in request.session.items):
        # For the workers, too, and read at imports: the tests, and where `datasets` keeps what it has read.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets-cache"))
        with WarmPython(), core_server.kept():
            yield
    else:
        yield


@pytest.fixture
def tokenizer() -> Any:
    """One token a byte; roles in brackets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Checkers:
    """The official IFEval checkers."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[ifeval]'")
    folder = nltk_data()
    if folder is None:
        pytest.skip("no punkt_tab here: python -m nltk.downloader -d tests/.cache/nltk_data punkt_tab")
    if folder:
        monkeypatch.setenv("NLTK_DATA", folder)
    return checkers()
