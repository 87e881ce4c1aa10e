"""report.html in a real browser: it opens fast, hostile texts stay text, filters work, axe finds nothing serious.

Needs chromium, chromedriver and selenium; the accessibility checks need axe-core, which is fetched by
`npm install --prefix tests/.cache axe-core@4.14.1`. What is missing is skipped and named.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perf.report_page import big_run
from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.files import write_agreement, write_winrate
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.recorded_winrate import versus_rates
from ray_pipeline.bench.page import benchmarks_page
from ray_pipeline.evaluate.methods_page import methods_page
from ray_pipeline.feedback.loop_stats import loop_stats
from ray_pipeline.feedback.page import loop_document
from ray_pipeline.operate.side_by_side import compare_page
from ray_pipeline.report.html import render_html, render_review
from tests.agreement.test_page import tables
from tests.evaluate.example_run import whole_run
from tests.evaluate.test_methods import page as methods
from tests.feedback.test_loop_stats import ENDS
from tests.feedback.test_loop_stats import tables as loop_tables
from tests.operate.test_side_by_side import pair
from tests.report.test_page import BENCHMARKS, NASTY, logged, nasty_run, page

pytestmark = [pytest.mark.e2e]

AXE = Path(os.environ.get("QUORUM_AXE", "tests/.cache/node_modules/axe-core/axe.min.js"))
PHONE, DESK = (390, 844), (1280, 900)


class Browser:
    """A window of headless Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, size: tuple[int, int] = DESK, scheme: str = "light") -> float:
        """Seconds until the page is there with its examples, if it has any."""
        width, height = size
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        start = time.perf_counter()
        self.driver.get(path.resolve().as_uri())
        self.wait("!document.getElementById('about') || document.documentElement.dataset.ready")
        return time.perf_counter() - start

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        end = time.perf_counter() + seconds
        while not self.run(f"return {condition}"):
            assert time.perf_counter() < end, condition
            time.sleep(0.02)

    def choose(self, name: str, value: str) -> None:
        """Set a filter as a user does, and wait for the list that belongs to it."""
        event = "input" if name == "search" else "change"
        self.run(
            "const old = document.documentElement.dataset.selected;"
            "const field = document.getElementById(arguments[0]); field.value = arguments[1]; window.old = old;"
            f"field.dispatchEvent(new Event('{event}'));",
            name,
            value,
        )
        self.wait("document.documentElement.dataset.selected !== window.old")

    def rows(self) -> list[int]:
        return self.run("return [...document.querySelectorAll('.row')].map((row) => Number(row.dataset.row))")

    def opened(self, place: int) -> dict[str, Any]:
        """Open a row of the list; the texts of its detail."""
        self.run("document.querySelectorAll('.row')[arguments[0]].click()", place)
        self.wait("document.querySelector('.open .id')")
        found = self.run(
            "const open = document.querySelector('.open');"
            "return {blocks: [...open.querySelectorAll('pre')].map((e) => e.textContent),"
            " cells: [...open.querySelectorAll('td')].map((e) => e.textContent), text: open.textContent,"
            " elements: [...open.querySelectorAll('script, img, b')].length}"
        )
        self.run("document.querySelectorAll('.row')[arguments[0]].click()", place)
        self.wait("!document.querySelector('.open')")
        return found

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def axe(self) -> list[tuple[str, str]]:
        """Serious and critical findings: (rule, the first element)."""
        if not AXE.is_file():
            pytest.skip(f"axe-core is not at {AXE}: npm install --prefix tests/.cache axe-core@4.14.1")
        self.run(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script("const done = arguments[0]; axe.run().then((r) => done(r.violations))")
        return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    from selenium.webdriver.chrome.service import Service

    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def test_rows_are_labelled_by_keyboard_and_saved(browser: Browser, folder: Path) -> None:
    rows = [
        {"candidate_id": str(n), "prompt_id": "p", "prompt": NASTY[n], "response": NASTY[n + 1], "label": "abstain",
         "why": "variance", "final_score": 5.0, "judges": [{"judge": "j", "score": 3.0, "reason": "<b>r</b>"}],
         "critique": None, "chosen_as": "value", "probability": 0.25}
        for n in range(3)
    ]  # fmt: skip
    path = folder / "review.html"
    path.write_text(render_review("Review", {"key": f"review {folder}", "file": "labels.jsonl"}, rows))
    browser.open(path)
    assert browser.run("return document.querySelectorAll('.text *').length") == 0

    def press(keys: str) -> None:
        browser.driver.switch_to.active_element.send_keys(keys)

    assert browser.run("return document.getElementById('response').textContent") == NASTY[1]
    press("d")
    press("n")
    press("unclear, d and u are text here\n")
    press("?")
    press("u")
    assert browser.run("return document.getElementById('progress').textContent") == "Row 3 of 3, 3 labelled"
    browser.open(path)  # labels survive a reload
    assert browser.run("return document.getElementById('progress').textContent") == "Row 1 of 3, 3 labelled"
    browser.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
    browser.run("document.getElementById('save').click()")
    text = browser.driver.execute_async_script("const done = arguments[0]; window.saved.text().then(done)")
    saved = [json.loads(line) for line in text.splitlines()]
    assert [row["label"] for row in saved] == ["desirable", "unsure", "undesirable"]
    assert {(row["chosen_as"], row["probability"]) for row in saved} == {("value", 0.25)}
    assert [row["note"] for row in saved] == [None, "unclear, d and u are text here", None]
    assert browser.errors() == [] and browser.axe() == []


def test_hostile_texts_stay_text(browser: Browser, folder: Path) -> None:
    path = folder / "nasty.html"
    path.write_text(page(nasty_run()), encoding="utf-8")
    for size, scheme in ((DESK, "dark"), (PHONE, "light")):
        browser.open(path, size, scheme)
        shown = {3: "\\x1b[31mred\\x1b[0m", 4: "\\u202eright to left\\u202c", 6: "line\n\ttab\nline"}
        for place in range(8):
            found = browser.opened(place)
            prompt, answer = found["blocks"][:2]
            expected = shown.get(place, NASTY[place])
            assert found["elements"] == 0 and prompt == shown.get(place // 4, NASTY[place // 4])
            if place == 7:
                assert answer == f"{expected[:20_000]}… [980,000 more characters]"
            else:
                assert answer == expected
            assert any(cell.startswith("<script>document.title='owned'</script> ") for cell in found["cells"])
        assert browser.run("return document.title") == f"Run {NASTY[1]}"
        assert browser.run("return document.documentElement.scrollWidth") <= size[0]
        assert browser.run("return document.querySelectorAll('img, iframe, object').length") == 0
    assert browser.errors() == []


def test_search_filters_and_order(browser: Browser, folder: Path) -> None:
    data = whole_run(120)
    assert data.decisions is not None and data.candidates is not None
    path = folder / "plain.html"
    path.write_text(page(data), encoding="utf-8")
    browser.open(path)
    labels = data.decisions.column("label").to_pylist()
    of_label = {name: [i for i, label in enumerate(labels) if label == name] for name in set(labels)}
    assert browser.rows() == list(range(40))  # the order of the prompts; forty to a page
    browser.choose("label", "3")
    assert browser.rows() == of_label["abstain"][:40]
    count = browser.run("return document.getElementById('count').textContent")
    assert count == f"{len(of_label['abstain'])} of 480 candidates"
    browser.choose("label", "0")
    browser.choose("sort", "high")
    final = data.decisions.column("final_score").to_pylist()
    assert [final[row] for row in browser.rows()] == sorted((final[i] for i in of_label["desirable"]), reverse=True)[
        :40
    ]
    browser.choose("label", "")
    browser.choose("sort", "prompt")
    browser.choose("disagreement", "unread")
    assert browser.rows() == list(range(0, 480, 20))
    browser.choose("disagreement", "")
    browser.choose("search", "SAY p007")
    assert browser.rows() == [28, 29, 30, 31]
    assert "Other candidates for this prompt" in browser.opened(0)["text"]
    browser.choose("search", "nothing has this")
    assert browser.rows() == [] and "0 of 480" in browser.run("return document.getElementById('count').textContent")
    browser.choose("search", "")
    browser.run("document.getElementById('next').click()")
    assert browser.rows()[0] == 40 and browser.errors() == []


def test_a_candidate_has_an_address_a_copy_and_raw_replies(browser: Browser, folder: Path) -> None:
    path = folder / "addresses.html"
    path.write_text(page(whole_run(120)), encoding="utf-8")
    browser.open(path)
    browser.choose("label", "3")
    browser.run("location.hash = '#c0405'")  # neither in this list nor on the first page of all
    browser.wait("document.querySelector('.open .id')")
    assert "candidate c0405 of prompt p101;" in browser.run("return document.querySelector('.open').textContent")
    assert browser.run("return document.querySelector('.row[aria-expanded=true]').dataset.row") == "405"
    assert browser.run("return document.querySelector('.open .tools a').getAttribute('href')") == "#c0405"
    raw = browser.run("return [...document.querySelectorAll('.open details')].map((e) => e.textContent)")
    assert [text.split(" gives ")[0] for text in raw] == [
        f"Raw reply of judge {judge}<b>{judge}</b>" for judge in ("conciseness", "factuality", "helpfulness")
    ]
    assert browser.run("return document.querySelectorAll('.open b').length") == 0
    browser.run(
        "const writeText = async (text) => { window.copied = text; };"
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText}});"
        "document.querySelector('.open .tools button').click()"
    )
    browser.wait("window.copied")
    copied = json.loads(browser.run("return window.copied"))
    assert (copied["candidate_id"], copied["prompt_id"], copied["prompt"]) == ("c0405", "p101", "say p101")
    assert len(copied["verdicts"]) == 3 and copied["verdicts"][0]["raw"].startswith("<b>conciseness</b>")
    browser.run("location.hash = '#nobody'")
    browser.run("location.hash = '#%'")
    browser.driver.get(path.resolve().as_uri() + "?again#c0007")  # the address of a link
    browser.wait("document.querySelector('.open .id')")
    assert "candidate c0007" in browser.run("return document.querySelector('.open').textContent")
    data = whole_run(20)
    path.write_text(page(replace(data, calls=logged(folder / "calls", data).location)), encoding="utf-8")
    browser.driver.get(path.resolve().as_uri() + "?calls#c0000")
    browser.wait("document.querySelector('.open .id')")
    calls = "[...document.querySelectorAll('.open details')].filter((e) => e.textContent.includes('Call to'))"
    assert browser.run(f"return {calls}.map((e) => e.textContent)") == [
        "Call to the generator: messages and reply", "Call to judge helpfulness: messages and reply"
    ]  # fmt: skip
    browser.run(f"{calls}[1].querySelector('summary').click()")
    browser.wait(f"{calls}[1].querySelector('pre')")
    texts = browser.run(f"return [...{calls}[1].querySelectorAll('pre')].map((e) => e.textContent)")
    assert texts[0].startswith("task say p000 answer word ") and texts[0].endswith(" rate it")
    assert texts[1:] == ["<think>hm</think><b>0</b> 0", "<think>hm</think><b>0</b> 1", "x"]
    assert browser.run("return document.querySelectorAll('.open b').length") == 0 and browser.errors() == []
    assert browser.errors() == []


def test_nothing_serious_for_axe(browser: Browser, folder: Path) -> None:
    settings = MeasureSettings(draws=100)
    document = as_document(measure(*tables(), settings), settings, {"data": "x.jsonl", "replay": "as told"})
    write_agreement(document, folder / "agreement")
    write_winrate(
        versus_rates(*tables(), draws=100), {"data": "x", "replay": "as told", "draws": 100}, folder / "winrate"
    )
    pages = {
        "run": page(whole_run()),
        "methods": render_html(methods_page(methods())),
        "compare": compare_page(*pair()),
        "agreement": (folder / "agreement" / "report.html").read_text(encoding="utf-8"),
        "winrate": (folder / "winrate" / "report.html").read_text(encoding="utf-8"),
        "benchmarks": render_html(benchmarks_page(BENCHMARKS)),
        "loop": render_html(loop_document("loop", loop_stats(*loop_tables(), ENDS))),
    }
    for name, html in pages.items():
        path = folder / f"{name}.html"
        path.write_text(html, encoding="utf-8")
        for size, scheme in ((DESK, "light"), (PHONE, "dark")):
            browser.open(path, size, scheme)
            assert browser.run("return document.documentElement.scrollWidth") <= size[0], name
            if name == "run":
                browser.run("document.querySelector('.row').click()")
                browser.wait("document.querySelector('.open .id')")
            assert browser.axe() == [], (name, size, scheme)
    assert browser.errors() == []


def test_fifty_thousand_candidates_open_in_three_seconds(browser: Browser, folder: Path) -> None:
    data = big_run(50_000, 300)
    path = folder / "big.html"
    path.write_text(page(data), encoding="utf-8")
    assert path.stat().st_size < 15_000_000
    # The best of a few: other work on the machine is no property of the page.
    seconds = []
    while len(seconds) < 4 and min(seconds, default=9.0) >= 3:
        seconds.append(browser.open(path))
    assert min(seconds) < 3, seconds
    assert data.decisions is not None
    kept = sum(label in ("desirable", "undesirable") for label in data.decisions.column("label").to_pylist())
    about = json.loads(browser.run("return document.getElementById('about').textContent"))
    assert about["rows"] >= kept + 2_000
    told = browser.run("return document.querySelector('#examples p').textContent")
    assert told.startswith(f"All {kept:,} kept candidates and {about['rows'] - kept:,} of {50_000 - kept:,} others")
    browser.choose("sort", "long")
    found = browser.opened(0)
    assert "more characters]" in found["blocks"][1] and len(found["cells"]) == 12
    assert browser.errors() == []
