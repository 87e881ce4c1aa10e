"""Public datasets in the shape in which they are published: every prompt and pair as it should be."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from ray_pipeline.bench.mt_bench.questions import questions_of
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.imported import read_preferences
from ray_pipeline.data.preference_sources import PreferenceSource
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.data.sources import HuggingFaceSource, InputError, JsonlSource, ParquetSource
from tests.prompt_sets import load_prompts

SETS = Path(__file__).parent / "public_sets"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def lines(name):
    return [json.loads(line) for line in (SETS / name).read_text().splitlines()]


def conversations(*sources):
    """Messages of all prompts, in the order of the sources, and the counts."""
    found = load_prompts(PromptsConfig(sources=list(sources)))
    rows = sorted(found.table.to_pylist(), key=lambda row: json.loads(row["meta"])["row"])
    return [row["messages"] for row in rows], found.counts, rows


def read(name, **options):
    return conversations(JsonlSource(path=str(SETS / name), **options))


def as_parquet(tmp_path, name):
    path = tmp_path / f"{Path(name).stem}.parquet"
    pq.write_table(pa.Table.from_pylist(lines(name)), path)
    return str(path)


def preferences(path, kind="parquet", **options):
    source = TypeAdapter(PreferenceSource).validate_python({"type": kind, "path": str(path), **options})
    config = DatasetsConfig(kinds=["sft"] if options.get("format") == "demonstrations" else ["kto", "dpo"])
    parts = []
    count = lambda prompt, completion: [*str(prompt), *str(completion)]  # noqa: E731
    counts = read_preferences(source, config, count, 0, 0.0, lambda _, part: parts.append(part))
    return parts[0], counts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a dataset folder of a file, for the real `datasets` library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name):
        folder = tmp_path / Path(name).stem
        folder.mkdir()
        (folder / "train.jsonl.gz").write_bytes(gzip.compress((SETS / name).read_bytes()))
        return str(folder)

    return make


def published(name):
    """The shipped source of a dataset."""
    return next(s for s in PromptsConfig().sources if isinstance(s, HuggingFaceSource) and s.name == name)


def test_ultrafeedback_as_the_default_source_reads_it(hub):
    source = published("openbmb/UltraFeedback").model_copy(
        update={"name": hub("ultrafeedback.jsonl"), "source_column": "source"}
    )
    messages, counts, rows = conversations(source)
    assert messages == [
        [user("List three uses of a paper clip.\n\n1.  \n2.  \n3.  ")],
        [user("def f(x):\n\treturn x\n\nWhat  does this return?")],
        [user("Q: Is the moon bigger than the sun?\nA: Let's think step by step.")],
    ]
    assert [row["source"] for row in rows] == ["evol_instruct", "sharegpt", "flan_v2_cot"] and counts["kept"] == 3


def test_helpsteer2_as_the_default_source_reads_it(hub):
    source = published("nvidia/HelpSteer2").model_copy(update={"name": hub("helpsteer2.jsonl")})
    messages, counts, _ = conversations(source)
    assert messages == [
        [user("what is a monad in plain words")],
        [
            user("Name a river in Peru."),
            assistant("The Ucayali.\n\nIt joins the Marañón."),
            user("How long is it?"),
            assistant("About 1,600 km."),
            user("And  the Marañón?"),
        ],
        [user("Hi"), assistant("Hello"), user("More")],
    ]
    assert (counts["read"], counts["dropped"]["duplicate"], counts["kept"]) == (6, 3, 3)


def test_capybara_in_both_forms(tmp_path):
    wanted = [
        [
            user("A jar holds 3 red and 2 blue marbles. How many must I draw to be sure of a red one?"),
            assistant("Three."),
            user("And of two red ones?"),
        ],
        [user("What is a prior?")],
    ]
    assert read("capybara.jsonl", column="conversation")[0] == wanted
    path = as_parquet(tmp_path, "capybara.jsonl")
    assert conversations(ParquetSource(path=path, column="conversation"))[0] == wanted
    path = as_parquet(tmp_path, "capybara_trl.jsonl")
    assert conversations(ParquetSource(path=path, column="messages"))[0] == wanted
    tables, _ = preferences(path, format="demonstrations")
    other, _ = preferences(as_parquet(tmp_path, "capybara.jsonl"), format="demonstrations", messages="conversation")
    assert tables["sft"].equals(other["sft"])
    assert [row["completion"] for row in tables["sft"].to_pylist()] == [
        [assistant("Four.")], [assistant("What one believes before the data.")]
    ]  # fmt: skip


def test_no_robots(tmp_path):
    path = as_parquet(tmp_path, "no_robots.jsonl")
    messages, _, rows = conversations(ParquetSource(path=path, column="messages", task_type_column="category"))
    assert messages == [
        [user("Write two lines about a heron.")],
        [
            {"role": "system", "content": "Pip is a gruff gardener."},
            user("My roses droop."),
            assistant("Water 'em, then."),
            user("How often?"),
        ],
    ]
    assert [row["task_type"] for row in rows] == ["Generation", "Chat"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_ultrafeedback_binarized(tmp_path, kind):
    name = "ultrafeedback_binarized.jsonl"
    path = SETS / name if kind == "jsonl" else as_parquet(tmp_path, name)
    tables, counts = preferences(path, kind, chosen_score="score_chosen", rejected_score="score_rejected")
    found = [(r["prompt"], r["chosen"], r["rejected"], r["score_gap"]) for r in tables["dpo"].to_pylist()]
    assert found == [
        ([user("Is tea a fruit?")], [assistant("No, it is made of leaves.")], [assistant("Yes.")], 6.5),
        ([user("Give a synonym of 'glad'.\n")], [assistant("Happy.")], [assistant("Sad.")], 0.5),
    ]
    assert counts["source"]["dropped"]["empty"] == 1 and tables["kto"].num_rows == 4


def test_mt_bench():
    one, other = questions_of(lines("mt_bench_question.jsonl"))
    assert one.turns == ("Describe a quiet harbour at dawn.", "Now use no word twice.")
    assert (one.question_id, other.category) == (81, "math")
    # Its user turns have no answers between them, so they are no prompt.
    with pytest.raises(InputError, match=r"2 of 2 rows are malformed.*column 'turns': message 0 is str, not an object"):
        read("mt_bench_question.jsonl", column="turns")
    messages, _, _ = read("mt_bench_human_judgments.jsonl", column="conversation_a")
    assert messages == [
        [user("Describe a quiet harbour at dawn."), assistant("Boats sleep."), user("Now use no word twice.")]
    ]


def test_alpaca_eval_is_one_array():
    messages, _, rows = read("alpaca_eval.json", column="instruction", source_column="dataset")
    assert messages == [
        [user("Which key is left of G on a piano?")],
        [user("Turn this table into a list:\n\n| a | b |\n| 1 |  |")],
    ]
    assert [row["source"] for row in rows] == ["helpful_base", "koala"]


def test_pandalm_has_instructions_with_an_input():
    messages, _, _ = read("pandalm_testset.json", column="instruction", input_column="input")
    assert messages == [
        [user("Sum up the note.\n\nBuy milk, then call Ada about the boat.")],
        [user("Is 7 a prime number?")],
    ]
