"""Nothing that a model or a user writes may act in the page, in a terminal that shows it, or in a plot."""

import csv
import io
import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_pipeline.evaluate.build import build_report
from ray_pipeline.evaluate.data import RunIdentity, StageUse
from ray_pipeline.report.csv_tables import arrow_csv, as_csv
from ray_pipeline.report.escaping import csv_cell, fenced, inline, paragraph
from tests.evaluate.example_run import whole_run

MARKDOWN = pytest.importorskip("markdown_it", reason="markdown-it-py renders the page for these checks")

NASTY = (
    (
        "```\n````\n~~~\n</code></pre><script>alert(1)</script>\n# heading\n| a | b |\n|---|---|\n"
        "![x](http://evil/x.png) [y](javascript:alert(1)) **bold** \x1b[31mred\x1b[0m \x07 \u202egnp.exe {{ 7*7 }} "
        "{% raw %} &lt;b&gt; $x$ `code` \\| \ud83d <img src=x onerror=alert(1)>\r\n\u2028end"
    )
    .encode("utf-8", "replace")
    .decode()
)
LABEL = "j|udge *x* `y` <b>z</b> [l](u) $\\frac{1}{0}$ \x1b[31m _em_ ~~s~~ \n# h"


def html_of(page: str) -> str:
    """As CommonMark with tables and raw HTML allowed: the least careful reader."""
    return str(MARKDOWN.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page))


def text_of(html: str) -> str:
    import html as html_module

    return html_module.unescape(re.sub(r"<[^>]+>", "", html))


@settings(deadline=None)
@given(st.text(max_size=200))
def test_inline_text_renders_as_itself(text: str) -> None:
    safe = inline(f"x{text}x")
    html = html_of(f"| h |\n|---|\n| {safe} |\n")
    assert set(re.findall(r"</?([a-z0-9]+)", html)) <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert html.count("<td>") == 1
    assert "\x1b" not in safe and "\n" not in safe and "\u202e" not in safe


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("-+=*#>1.) a\n"), max_size=12) | st.text(max_size=60))
@example("1. a").via("list")
@example("- - -").via("rule")
@example("---").via("rule")
def test_a_line_that_begins_with_any_text_stays_a_paragraph(text: str) -> None:
    safe = paragraph(text)
    for html, around in ((html_of(f"{safe}\n"), ("<p>", "</p>")), (html_of(f"- {safe}x\n"), ("<ul>\n<li>", "</li>"))):
        assert not safe or (html.startswith(around[0]) and html.count("<p>") + html.count("<li>") == 1), html
        assert set(re.findall(r"</?([a-z0-9]+)", html)) <= {"p", "ul", "li"}


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("`~ab\n\\<|\x1b\t "), max_size=120) | st.text(max_size=120))
def test_fenced_text_never_leaves_its_block(text: str) -> None:
    html = html_of(f"before\n\n{fenced(text)}\n\n**after**\n")
    assert html.count("<pre>") == 1 and html.endswith("</code></pre>\n<p><strong>after</strong></p>\n")
    assert set(re.findall(r"</?([a-z0-9]+)", html)) <= {"p", "pre", "code", "strong"}


def test_a_whole_page_of_hostile_text(tmp_path: Path) -> None:
    plain = whole_run(12)
    verdicts = plain.verdicts
    assert verdicts is not None and plain.candidates is not None and plain.decisions is not None
    judges = pa.array([LABEL if j == "helpfulness" else j for j in verdicts.column("judge").to_pylist()])
    data = whole_run(
        12,
        run=RunIdentity(
            NASTY, NASTY, NASTY, fingerprints={LABEL: NASTY}, models={LABEL: NASTY}, stages=("prompts", "candidates")
        ),
        prompt_counts={"read": 1, "kept": 1, "dropped": {NASTY: 3}},
        prompts=plain.prompts.set_column(  # type: ignore[union-attr]
            1, "messages", pa.array([[{"role": "user", "content": NASTY}, {"role": NASTY, "content": NASTY}]] * 12)
        ),
        candidates=plain.candidates.set_column(2, "response", pa.array([NASTY] * 48)),
        decisions=plain.decisions.set_column(4, "why", pa.array([NASTY] * 48)),
        verdicts=verdicts.set_column(1, "judge", judges).set_column(3, "parse_status", pa.array([NASTY] * 144)),
        critiques=pa.table({"flawed": [True], "failure_type": [NASTY], "parse_status": [NASTY]}),
        dataset_counts={NASTY: {NASTY: 1}},
        dataset_guards={NASTY: 1},
        kto_weights={NASTY: 1.0},
        train_settings={NASTY: NASTY, "list": [NASTY]},
        comparisons=plain.comparisons.set_column(2, "judge", pa.array([LABEL] * 24)),  # type: ignore[union-attr]
        evaluating_models={LABEL: NASTY},
        curating_models={LABEL: NASTY},
        stage_use=[StageUse(NASTY, 1, 1, 1, 1, 1, 1, 1.0, 1)],
    )
    paths = build_report(data, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]", page)
    html = html_of(page)
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)", html))
    assert tags <= {
        "h1", "h2", "h3", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "img",
        "a",
    }  # fmt: skip
    assert all(re.fullmatch(r"report\.html#[\w.%-]+", link) for link in re.findall(r'href="([^"]*)"', html))
    assert set(re.findall(r'src="([^"]*)"', html)) <= {f"charts/{p.name}" for p in paths}
    assert html.count("<h1>") == 1 and html.count("<pre>") == 7
    assert "49" not in text_of(html).split("alert")[0] and "{{ 7*7 }}" in text_of(html)
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        widths = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.S)}
        assert len(widths) == 1, "a cell broke out of its row"
    (row,) = csv.DictReader((tmp_path / "summary.csv").open(encoding="utf-8"))
    assert "\x1b" not in row["run"] and row["candidates"] == "48"


def test_lone_surrogates_in_names_do_not_stop_the_report(tmp_path: Path) -> None:
    build_report(whole_run(12, run=RunIdentity("a\ud800b"), dataset_guards={"\udfff": 1}), tmp_path)
    assert "a\\\\ud800b" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"])
def test_a_cell_of_csv_is_no_formula(text: str) -> None:
    row = as_csv({"name": text, "=head": 1.5, "n": -2, "text": "-2.5", "word": "a=b"})
    (header, values) = csv.reader(io.StringIO(row))
    assert values[0].startswith("'") and values[1:] == ["1.5", "-2", "-2.5", "a=b"]
    assert header == ["name", "'=head", "n", "text", "word"]
    rows = arrow_csv(pa.table({"name": [text, None], "n": [-2, 3]}))
    assert list(csv.reader(io.StringIO(rows))) == [["name", "n"], [values[0], "-2"], ["", "3"]]


@given(st.text())
def test_no_cell_of_csv_begins_as_a_formula_unless_it_is_a_number(text: str) -> None:
    cell = csv_cell(text)
    if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        float(cell)
