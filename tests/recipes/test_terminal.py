"""What training tells in a terminal of 80 columns: nothing is cut off, nothing is squeezed into towers of syllables."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from chiasm.train.log import Bars, print_plan
from chiasm.train.plan import Plan, Row
from chiasm.train.proof import PartProof, Report
from chiasm.train.watch import print_proof

RECORD = {"loss": 1234.5678, "lr": 2.5e-05, "samples_per_s": 12345.6, "seconds_per_step": 2.0}
RECORD |= {"usage/cpu_percent": 3200.0, "usage/memory_gib": 127.9}


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def lines(console: Console) -> list[str]:
    """What was shown, without the terminal's own signs; a line that was painted over is one more line."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("width", [80, 120])
def test_the_proof_is_a_table_of_one_line_a_part(width):
    train = PartProof("connectors.image", "train", 1104, 9_000_000, 1104, 1104, 2, 24, 1.3e-02, 3.9e-02)
    frozen = PartProof("encoders.image", "freeze", 391, 300_000_000)
    console = terminal(width)
    print_proof(console, "instruct", Report("proved", 5200, [train, frozen, PartProof("lm", "freeze", 291)]))
    shown = lines(console)
    assert max(map(len, shown)) <= width
    assert shown[1].split() == ["part", "plan", "tensors", "gradient", "changed", "first", "gradients"]
    assert shown[2].split() == ["connectors.image", "train", "1104", "1104", "1104", "1.3e-02", "…", "3.9e-02"]
    assert shown[3].split() == ["encoders.image", "freeze", "391", "0"]
    assert shown[5:] == [
        "  trained tensors that by design never run: 2 of connectors.image",
        "  trained tensors that by design cancel out: 24 of connectors.image",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_and_the_bar_fit(width):
    console = terminal(width)
    rows = [Row("encoders.image", 303_507_456, "freeze", None), Row("lm", 6_738_415_616, "lora(r=16, alpha=32)", 2e-05)]
    print_plan(console, "instruct", Plan({}, tuple(rows)))
    assert any(line.split() == ["lm", "6,738,415,616", "lora(r=16,", "alpha=32)", "2e-05"] for line in lines(console))
    console = terminal(width)
    with Bars(console, "stage2_instruct", 10_000) as bars:
        bars.update(5_200, RECORD)
        bars.advance(5_200)
    shown = lines(console)
    assert max(map(len, shown)) <= width and not any("…" in line for line in shown)
    assert "5200/10000" in shown[-1] and "loss 1234.568" in shown[-1] and "12346 samples/s" in shown[-1]
    assert ("cpu 3200 % 127.9 GiB" in shown[-1]) == (width == 120)


def test_without_a_terminal_everything_is_told():
    console = Console(file=io.StringIO(), width=120)
    with Bars(console, "s", 10) as bars:
        bars.update(10, RECORD)
    assert "lr 2.5e-05  12346 samples/s  cpu 3200 % 127.9 GiB  0 s left" in console.file.getvalue()
