"""How long training waits for its data: in every line of the log, at the end of the stage, on the pages."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import source, tiny_vlm, write_pictures

from chiasm.data.loader import Renderer
from chiasm.data.mixture import Entry, Mixture
from chiasm.report.run import StageReport
from chiasm.train import usage
from chiasm.train.live import _numbers
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage
from chiasm.train.usage import Waits

PAUSE = 0.03  # seconds that a sample of the slow renderer takes


class Slow(Renderer):
    """Takes its time over every sample."""

    def sample(self, example):
        time.sleep(PAUSE)
        return super().sample(example)


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch) -> Hands:
    found = Hands()
    monkeypatch.setattr(usage, "time", found)
    return found


def test_the_share_is_waiting_over_steps_without_the_first_batch_and_pauses(hands):
    def items() -> Iterator[int]:
        for number, seconds in enumerate((7.0, 1.0, 2.0)):
            hands.now += seconds
            yield number

    waits, since = Waits(), []
    for _ in waits.over(items()):
        hands.now += 10.0  # the step
        hands.now += 30.0  # an evaluation
        waits.paused += 30.0
        since.append(waits.since())
    assert since == [7.0, 1.0, 2.0]
    assert waits.first == 7.0
    assert waits.share == pytest.approx(3.0 / 33.0)
    told = waits.told(workers=0)
    assert "first batch after 7.00 s" in told and "workers: 2" in told
    assert "workers: 8" in waits.told(workers=4)
    waits.waited = 0.01
    assert waits.told(workers=4).endswith("(4 data workers; first batch after 7.00 s)")


def test_an_error_of_the_data_passes_through():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(Waits().over(items()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_tells_its_waiting(tmp_path: Path, workers: int):
    write_pictures(tmp_path)
    vlm, said = tiny_vlm(tmp_path), io.StringIO()
    slow = Slow(vlm.processor)
    stage = Stage(name="s", lr=1e-3, steps=4, batch_size=2, log_every=2, workers=workers)
    data, out = Mixture({"colors": Entry(source=source(tmp_path))}), tmp_path / "run"
    StageRun(vlm.model, slow, stage, data, out, console=Console(file=said, width=200)).fit()
    report = StageReport.read(out, stage.dump())
    records = [r for r in report.log if "data_wait" in r]
    assert [r["step"] for r in records] == [2, 4]
    assert all(0 <= r["data_wait"] <= 1 for r in records)
    assert "Stage s: waited for data" in said.getvalue()
    assert "first batch after" in said.getvalue()
    assert report.data_wait == pytest.approx(records[1]["data_wait"])
    assert "waiting for data" in [label for label, _, value in _numbers(report) if value is not None]
    if not workers:  # two samples a step, made where the step is
        assert all(r["data_wait"] * 2 * r["seconds_per_step"] >= 4 * PAUSE for r in records)
