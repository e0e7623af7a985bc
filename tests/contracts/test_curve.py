"""Curves of reports show what there is of them."""

from __future__ import annotations

import re

from chiasm.report.curve import Line, curve


def test_a_curve_of_one_point_is_a_dot() -> None:
    """A path of one point draws nothing: a run with one line in its log would show an empty picture."""
    drawn = str(curve([Line("loss", "train", [(2.0, 3.2)], smooth=True)], "loss"))
    assert len(re.findall(r'<circle class="train"', drawn)) == 1
    longer = str(curve([Line("loss", "train", [(2.0, 3.2), (4.0, 3.0)], smooth=True)], "loss"))
    assert "<circle" not in longer and longer.count('<path class="train') == 2


def test_no_point_no_curve() -> None:
    assert str(curve([Line("loss", "train", [])], "loss")) == ""
