"""Means of human labels over all judged items, from labels of some."""

from __future__ import annotations

import numpy as np
import pytest

from ray_pipeline.agents.jury import MISSING
from ray_pipeline.agreement.document import as_document, measure
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.page import agreement_page
from ray_pipeline.report.documents import as_json
from ray_pipeline.report.markdown import render_markdown
from tests.agreement.test_pools import panel, tables


def test_a_panel_narrows_the_win_rate_of_a_few_labels() -> None:
    codes, truth = panel(1200, (0.9, 0.9, 0.85, 0.8), missing=0.05)
    some = np.where(np.arange(1200) % 8 == 0, truth, MISSING).astype(np.int8)
    settings = MeasureSettings(draws=100)
    found = measure(*tables(codes, some), settings)
    win, agree = found.powered
    assert (win.quantity, win.found.labels, win.found.unlabelled) == ("win rate of answer B", 150, 1050)
    assert win.found.alone.value == pytest.approx((truth[::8] / 2).mean())
    for line, known in ((win.found, (truth / 2).mean()), (agree.found, None)):
        assert line.powered.low is not None and line.powered.high is not None
        assert known is None or line.powered.low < known < line.powered.high
    assert win.found.worth is not None and win.found.worth > 450
    assert agree.found.alone.value is not None and agree.found.alone.value > 0.9
    document = as_json(as_document(found, settings, {"data": "x", "replay": "y"}))
    text = render_markdown(agreement_page(document))
    assert "win rate of answer B, direct" in text and "random sample of all" in text
    # With a label for every item, or for none, there is nothing to add.
    assert measure(*tables(codes, truth), settings).powered == []
    assert measure(*tables(codes, np.full_like(truth, MISSING)), settings).powered == []
