"""Logs: the file always, other places by option, a live page, what the machine does."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import model_config, source, tokenizer_folder, write_pictures

from chiasm.errors import ConfigError
from chiasm.report.run import StageReport
from chiasm.train import sinks as sinks_module
from chiasm.train.live import LivePage, thinned
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Recipe
from chiasm.train.run import train
from chiasm.train.sinks import LogSpec, numbers
from chiasm.train.usage import Usage, told


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path, count=12)
    return tmp_path


def recipe(data: Path, log: dict, **changes) -> Recipe:
    stage = {"name": "s", "plan": "instruct", "steps": 4, "lr": 1e-3, "batch_size": 2, "log_every": 1}
    values = {
        "name": "logged",
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "stages": [stage | changes.pop("stage", {})],
        "out": str(data / "run"),
        "device": "cpu",
        "log": log,
    }
    return Recipe.parse(values | changes)


def records(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "run" / "s" / "log.jsonl").read_text().splitlines()]


class Tracker(types.ModuleType):
    """Stands in for wandb and trackio, which take the same calls."""

    def __init__(self, name):
        super().__init__(name)
        self.calls: list = []

    def init(self, **options):
        self.calls.append(("init", options))
        return types.SimpleNamespace(id=f"id{len(self.calls)}")

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def tracker(monkeypatch):
    made = {}
    for name in ("wandb", "trackio"):
        made[name] = Tracker(name)
        monkeypatch.setitem(sys.modules, name, made[name])
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: object())
    return made


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_number_and_a_resumed_run_its_own(data, tracker, name, monkeypatch):
    made = recipe(data, {name: {"project": "eyes", "entity": "me"}}, stage={"save_every": 2})
    update = StageRun.update

    def stop(self, step, tally):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step, tally)

    monkeypatch.setattr(StageRun, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(made, console=Console(file=io.StringIO()))
    monkeypatch.setattr(StageRun, "update", update)
    train(made, resume=True, console=Console(file=io.StringIO()))
    calls = tracker[name].calls
    assert [c[0] for c in calls] == ["init", *["log"] * 3, "finish", "init", *["log"] * 3, "finish"]
    first, second = (c[1] for c in calls if c[0] == "init")
    assert first["project"] == "eyes" and first["entity"] == "me" and first["name"] == "logged/s"
    assert first["config"]["lr"] == 1e-3 and "resume" not in first
    assert second["resume"] == "allow" and (name == "trackio" or second["id"] == "id1")
    logged = [(c[1], c[2]) for c in calls if c[0] == "log"]
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4, 4]  # the last is the meter's reading
    assert [(step, values) for step, values in logged[3:]] == [(r["step"], numbers(r)) for r in records(data)[2:]]


def test_tensorboard_gets_every_number(data, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: object())
    train(recipe(data, {"tensorboard": True}), console=Console(file=io.StringIO()))
    assert written[0] == (str(data / "run" / "s" / "tensorboard"), None) and written[-1] == "closed"
    wanted = [(name, value, r["step"]) for r in records(data) for name, value in numbers(r).items()]
    assert written[1:-1] == wanted and ("loss", records(data)[0]["loss"], 1) in wanted


def test_the_real_tensorboard_reads_it_back(data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(data, {"tensorboard": True}), console=Console(file=io.StringIO()))
    found = EventAccumulator(str(data / "run" / "s" / "tensorboard")).Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars("loss")]
    assert losses == [(r["step"], r["loss"]) for r in records(data) if "loss" in r]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_anything_begins(data, name, monkeypatch):
    monkeypatch.setattr(sinks_module, "find_spec", lambda name: None)
    told = rf"log.{name} needs the package '{name}'.* pip install 'chiasm\[{name}\]', or take"
    with pytest.raises(ConfigError, match=told):
        train(recipe(data, {name: True}), console=Console(file=io.StringIO()))
    assert not (data / "run").exists()


def test_options_are_checked():
    with pytest.raises(ConfigError, match="needs a project"):
        LogSpec.parse({"wandb": {"entity": "me"}})
    with pytest.raises(ConfigError, match="tensorbord"):
        LogSpec.parse({"tensorbord": True})
    assert LogSpec().seconds is None and LogSpec(live=True).seconds == 10 and LogSpec(live=0.5).seconds == 0.5
    with pytest.raises(ConfigError):
        LogSpec.parse({"live": -1})


# ---------------------------------------------------------------------------------------------------------- live page


def test_the_live_page_follows_a_run(data, monkeypatch):
    pages = []
    write = LivePage.write

    def kept(self, record):
        write(self, record)
        pages.append(self.path.read_text())

    monkeypatch.setattr(LivePage, "write", kept)
    file = io.StringIO()
    train(recipe(data, {"live": 0.0}), console=Console(file=file, width=200))
    assert len(pages) == 5
    for number, page in enumerate(pages[:4], 1):
        assert f'value="{number}"' in page and f"step {number} of 4" in page
        assert '<meta http-equiv="refresh" content="1">' in page and "<svg" in page
    last = (data / "run" / "live.html").read_text()
    assert "refresh" not in last and "finished" in last and "Proof of training: proved" in last
    assert not re.search(r"(src|href)=|https?://(?!www.w3.org)|@import|url\(", last)  # refers to nothing else
    assert not list((data / "run").glob(".live*"))
    assert "Live page:" in file.getvalue() and "cpu " in file.getvalue()


def test_a_stopped_run_says_so_on_its_page(data, monkeypatch):
    def stop(self, step, tally):
        raise ConfigError("<b>bad</b> luck")

    monkeypatch.setattr(StageRun, "update", stop)
    with pytest.raises(ConfigError):
        train(recipe(data, {"live": True}), console=Console(file=io.StringIO()))
    page = (data / "run" / "live.html").read_text()
    assert "stopped" in page and "&lt;b&gt;bad&lt;/b&gt; luck" in page and "refresh" not in page


def test_long_curves_are_thinned_whole():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    few = thinned(points, 100)
    assert len(few) == 100 and few[-1][0] == 9999.0
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 10_000)
    assert thinned(points[:100], 100) == points[:100]


def test_the_report_shows_proof_and_meter(data):
    train(recipe(data, {}), console=Console(file=io.StringIO()))
    page = (data / "run" / "report.html").read_text()
    stage = StageReport.read(data / "run" / "s", {})
    assert stage.proof["verdict"] == "proved" and "Proof of training" in page
    assert stage.reading["told"] and stage.reading["told"].split(":")[0] in page


# -------------------------------------------------------------------------------------------------------------- usage


def test_usage_measures_this_process():
    import time

    usage = Usage()
    begun = time.process_time()
    while time.process_time() - begun < 0.2:
        sum(range(1000))
    found = usage.read()
    assert 5 < found["usage/cpu_percent"] <= 110 * 8
    assert 0.05 < found["usage/memory_gib"] < 64
    assert re.fullmatch(r"cpu \d+ % \d+\.\d GiB", told(found))
    time.sleep(0.3)
    assert usage.read()["usage/cpu_percent"] < found["usage/cpu_percent"]
    assert told({}) == ""
