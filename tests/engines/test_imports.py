"""Heavy imports leave the collection of garbage as it was, and tokenizers are loaded without torch."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_pipeline.data.tokens import TokenCounter
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.pocket import WEIGHTS
from tests.training.shapes import FAMILIES, make_tokenizer

CHATS = [
    ([{"role": "user", "content": "add 3 4 5"}], None),
    ([{"role": "user", "content": "a <|im_end|> b  [INST]\n\n漢字 ü"}], None),
    ([{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}], None),
    ([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "3 7 12 gives 12"}]),
]
_COUNTED = """
import json, os, sys
advice = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
from ray_pipeline.data.tokens import token_counter
from ray_pipeline.engines.models import TokenizerSettings
folders, chats = json.load(sys.stdin)
print(json.dumps([[token_counter(TokenizerSettings(model=f))(*chat) for chat in chats] for f in folders]))
assert not {"torch", "scipy", "sklearn"} & sys.modules.keys()
assert os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS") == advice
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_pretrained(folders[0]).device.type == "cpu"
assert "torch" in sys.modules
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with heavy_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), heavy_imports():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_tokens_are_counted_without_torch_and_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folders = [WEIGHTS / "policy"]
    for name, family in FAMILIES.items():
        folders.append(tmp_path / name)
        make_tokenizer(family).save_pretrained(folders[-1])
        (folders[-1] / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    done = subprocess.run(
        [sys.executable, "-c", _COUNTED],
        input=json.dumps([[str(folder) for folder in folders], CHATS]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counters = [TokenCounter(AutoTokenizer.from_pretrained(folder)) for folder in folders]
    assert json.loads(done.stdout) == [[counter(*chat) for chat in CHATS] for counter in counters]
