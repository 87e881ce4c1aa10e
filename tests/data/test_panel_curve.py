"""The simulated curve of docs/evidence.md, small, against what its model gives in closed form."""

from xml.etree import ElementTree

import pytest

from perf.panel_curve import chart, simulate, table


def unanimous(accuracy: float, correlation: float) -> float:
    """P(a response is right | all three judges say so), with half of all responses right."""
    right = correlation * accuracy + (1 - correlation) * accuracy**3
    wrong = correlation * (1 - accuracy) + (1 - correlation) * (1 - accuracy) ** 3
    return right / (right + wrong)


@pytest.mark.parametrize(("accuracy", "correlation"), [(0.8, 0.0), (0.8, 0.9), (0.7, 0.3), (0.9, 1.0)])
def test_the_gate_orders_as_the_model_says(accuracy: float, correlation: float) -> None:
    found = simulate(accuracy, correlation, 600)
    expected = unanimous(accuracy, correlation) ** 2
    assert found.gated.made > 100 and abs(found.gated.ordered - expected) < 4 * found.gated.error
    # Of four responses the judge takes all for right, or all for wrong, once in eight: then the order is chance.
    by_chance = accuracy * (1 - accuracy)
    assert abs(found.raw.ordered - (7 / 8 * accuracy**2 + by_chance / 8)) < 4 * found.raw.error
    assert found.raw.made > found.gated.made
    assert found == simulate(accuracy, correlation, 600)


def test_chart_and_table() -> None:
    outcomes = [simulate(0.8, c, 60) for c in (0.0, 0.9)]
    drawn = chart(outcomes, 60)
    assert ElementTree.fromstring(drawn.svg).tag.endswith("svg") and drawn.title.startswith("More truly ordered")
    lines = table(outcomes).splitlines()
    assert (
        len(lines) == 4
        and lines[2].startswith("| 80 % | 0.00 | 3.00 |")
        and lines[3].startswith("| 80 % | 0.90 | 1.07 |")
    )
