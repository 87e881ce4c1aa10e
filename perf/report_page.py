"""Size, building time and opening time of report.html for a run of 50,000 candidates of 300 words.

    python perf/report_page.py [--candidates 50000] [--words 300] [--keep FOLDER]

The tables are synthetic: words of a made-up language in the frequencies of a real one (Zipf), so that texts compress
about as real ones do; a judge's reason is some 20 words. Opening needs chromium and selenium, else it is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_pipeline.evaluate.cautions import cautions
from ray_pipeline.evaluate.data import ReportData, RunIdentity, StageUse
from ray_pipeline.evaluate.headline import headline
from ray_pipeline.evaluate.metrics import collect_metrics
from ray_pipeline.evaluate.run_page import run_page
from ray_pipeline.report.html import render_html

JUDGES = ("helpfulness", "factuality", "conciseness")


def big_run(candidates: int = 50_000, words: int = 300, seed: int = 0) -> ReportData:
    """A run of `candidates` answers of about `words` words, four a prompt, all judged; some two in five are kept."""
    rng = np.random.default_rng(seed)
    ids = [f"{i:032x}" for i in rng.permutation(candidates)]
    prompt_ids = [f"p{i:07d}" for i in range((candidates + 3) // 4)]
    text = _language(rng)
    quality = rng.normal(5.5, 2.2, candidates)
    scores = np.clip(np.round(quality + rng.normal(0, 1.1, (3, candidates))), 1, 10)
    flawed = quality < 3.5
    mean, variance = scores.mean(axis=0), scores.var(axis=0, ddof=1)
    final = mean * (1 - 0.15 * flawed)
    labels = np.select(
        [variance > 2.5, final >= 7, final <= 4], ["abstain", "desirable", "undesirable"], "discard"
    ).tolist()
    lengths = rng.integers(int(words * 0.8), int(words * 1.2) + 1, candidates)
    of_prompt = [prompt_ids[i // 4] for i in range(candidates)]
    return ReportData(
        run=RunIdentity("fifty thousand", config_digest="0" * 32, fingerprints={"gate": "0" * 16}),
        prompt_counts={"read": len(prompt_ids) + 100, "kept": len(prompt_ids), "dropped": {"duplicate": 100}},
        prompts=pa.table(
            {
                "prompt_id": prompt_ids,
                "messages": [[{"role": "user", "content": t}] for t in text(np.full(len(prompt_ids), 30))],
            }
        ),
        candidates=pa.table(
            {
                "candidate_id": ids,
                "prompt_id": of_prompt,
                "response": text(lengths),
                "completion_tokens": (lengths * 1.3).astype("int32"),
            }
        ),
        verdicts=pa.table(
            {
                "candidate_id": ids * 3,
                "judge": [judge for judge in JUDGES for _ in ids],
                "score": scores.ravel(),
                "reason": text(np.full(3 * candidates, 20)),
                "parse_status": ["ok"] * (3 * candidates),
            }
        ),
        critiques=pa.table(
            {
                "candidate_id": ids,
                "flawed": flawed,
                "failure_type": ["unsupported" if bad else "none" for bad in flawed],
                "reason": text(np.full(candidates, 20)),
                "parse_status": ["ok"] * candidates,
            }
        ),
        decisions=pa.table(
            {
                "candidate_id": ids,
                "mean_score": mean,
                "score_variance": variance,
                "penalty": 0.15 * flawed,
                "final_score": final,
                "label": labels,
                "why": [f"variance and final score say {label}" for label in labels],
            }
        ),
        stage_use=[StageUse("judge", 3 * candidates, 3 * candidates, 0, 10**8, 10**7, 10**7, 3600.0)],
        bootstrap_draws=500,
    )


def _language(rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A function that makes a text of each of the given numbers of words."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 8_000)], dtype=object)
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    cumulated = np.cumsum(weights / weights.sum())

    def text(lengths: np.ndarray) -> list[str]:
        picks = np.minimum(np.searchsorted(cumulated, rng.random(int(lengths.sum()))), len(vocabulary) - 1)
        words, ends = vocabulary[picks].tolist(), np.cumsum(lengths).tolist()
        return [" ".join(words[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="folder in which report.html stays")
    given = parser.parse_args()
    data = big_run(given.candidates, given.words)
    start = time.perf_counter()
    metrics = collect_metrics(data)
    counted = time.perf_counter()
    first_line = headline(metrics.evaluation, data.missing_stages())
    html = render_html(run_page(data, metrics, first_line, cautions(data, metrics)))
    built = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = (given.keep or Path(folder)) / "report.html"
        path.write_text(html, encoding="utf-8")
        print(f"{given.candidates:,} candidates of about {given.words} words")
        print(f"report.html: {path.stat().st_size / 1e6:.2f} MB")
        print(f"statistics {counted - start:.1f} s, page {built - counted:.1f} s")
        try:
            print("opened in headless Chromium: " + ", ".join(f"{s:.2f} s" for s in open_times(path)))
        except (ImportError, FileNotFoundError) as missing:
            print(f"not opened: {missing}")


def open_times(path: Path, times: int = 3) -> list[float]:
    """Seconds from asking for the page until its first examples are shown, each in a new window of the browser.

    Raises:
        ImportError, FileNotFoundError: selenium or chromium is not there.
    """
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.wait import WebDriverWait

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        raise FileNotFoundError("chromium or chromedriver is not on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    ready = "return document.documentElement.dataset.ready"
    found = []
    try:
        for _ in range(times):
            driver.get("about:blank")
            start = time.perf_counter()
            driver.get(path.resolve().as_uri())
            WebDriverWait(driver, 60, poll_frequency=0.02).until(lambda d: d.execute_script(ready))
            found.append(time.perf_counter() - start)
    finally:
        driver.quit()
    return found


if __name__ == "__main__":
    main()
