"""The image-use meter: a model that looks is said to look, a blind one is flagged, and text alone does not count."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import model_config, renderer, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.data.mixture import Entry, Mixture
from chiasm.data.shuffle import media_of, with_media
from chiasm.train.meter import FEWEST, Meter, Reading
from chiasm.train.recipe import Recipe
from chiasm.train.run import Run, train
from chiasm.types import Message, Text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path, count=24)
    return tmp_path


def recipe(data: Path, **changes) -> Recipe:
    stage = {"name": "s", "plan": "end_to_end", "steps": 90, "lr": 4e-3, "batch_size": 8, "eval_every": 45}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "held_out": {"colors": {"source": source(data)}},
        "stages": [stage],
        "eval": {"limit": 2, "loss_samples": 24, "max_new_tokens": 2},
        "out": str(data / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values | changes)


def readings(data: Path) -> list[dict]:
    lines = [json.loads(line) for line in (data / "run" / "s" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "image_use/verdict" in line]


def test_a_model_that_looks_is_said_to_look(data):
    file = io.StringIO()
    train(recipe(data), console=Console(file=file, width=300))
    found = readings(data)
    assert [r["step"] for r in found] == [45, 90]
    last = found[-1]
    assert last["image_use/verdict"] == "looks" and last["image_use/gain"] > 0.05 and last["image_use/samples"] == 24
    assert "The model uses its pictures" in file.getvalue()
    assert last["image_use/told"] in (data / "run" / "report.html").read_text().replace("&#39;", "'")


def test_a_planted_blind_run_is_flagged(data, monkeypatch):
    """Every picture in training is another example's, in a new way each time: the loss falls all the same."""
    opened = Mixture.__getitem__
    count = 0

    def blind(self, ref):
        nonlocal count
        example = opened(self, ref)
        if self.names and self is not held["mixture"]:
            count += 1
            other = opened(self, (ref[0], (ref[1] * 7 + 5 * count + 1) % len(self.sources[ref[0]])))
            return with_media(example, media_of(other))
        return example

    held = {"mixture": None}
    init = Run.__init__

    def remember(self, *args, **options):
        init(self, *args, **options)
        held["mixture"] = self.held_out

    monkeypatch.setattr(Run, "__init__", remember)
    monkeypatch.setattr(Mixture, "__getitem__", blind)
    file = io.StringIO()
    train(recipe(data), console=Console(file=file, width=300))
    found = readings(data)
    losses = [json.loads(line) for line in (data / "run" / "s" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in losses if "loss" in r]
    assert losses[-1] < 0.6 * losses[0]  # nothing in the loss itself tells
    assert found[-1]["image_use/verdict"] == "blind"
    assert "does NOT look at its pictures" in file.getvalue()
    assert 'class="blind"' in (data / "run" / "report.html").read_text()


def test_a_dead_connector_is_blind(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    vlm.model.connectors["image"].layers[2].weight.data.zero_()
    mixture = Mixture({"colors": Entry(source=source(data))})
    meter = Meter(vlm.model, renderer(vlm), [mixture[0, i] for i in range(16)], 4)
    found = meter()
    assert found.gain == 0.0 and found.verdict == "blind" and found.samples == 16


def test_readings_are_the_losses_of_single_samples(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    mixture = Mixture({"colors": Entry(source=source(data))})
    meter = Meter(vlm.model, renderer(vlm), [mixture[0, i] for i in range(10)], 4)
    found = meter()
    for examples, loss in ((meter.true, found.true), (meter.mixed, found.shuffled)):
        losses = []
        for example in examples:
            batch = renderer(vlm).batch([example])
            logits = vlm.model(batch, logits="all").logits[:, :-1]
            mask = batch.loss_mask[:, 1:]
            losses.append(float(torch.nn.functional.cross_entropy(logits[mask], batch.input_ids[:, 1:][mask]).detach()))
        assert sum(losses) / len(losses) == pytest.approx(loss, abs=1e-5)
    assert [e.id for e in meter.true] == [e.id for e in meter.mixed]
    assert all(a.messages != b.messages for a, b in zip(meter.true, meter.mixed))


def test_text_alone_does_not_count(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    mixture = Mixture({"colors": Entry(source=source(data))})
    pictures = [mixture[0, i] for i in range(10)]
    turns = (Message("user", (Text("Say a"),)), Message("assistant", (Text("a"),)))
    text = [replace(e, id=f"t{e.id}", messages=turns, source="text") for e in pictures]
    both = Meter(vlm.model, renderer(vlm), [*text, *pictures], 4)
    assert {e.source for e in both.true} == {"colors"} and both().samples == 10
    assert Meter(vlm.model, renderer(vlm), text, 4)() is None


def test_verdicts():
    assert Reading(2.0, 2.0, 0.01, 64).verdict == "blind"
    assert Reading(2.0, 2.5, 0.01, 64).verdict == "looks"
    assert Reading(2.0, 2.5, 0.3, 64).verdict == "blind"  # within three standard errors
    assert Reading(2.0, 2.01, 0.0001, 64).verdict == "blind"  # sure, but worth nothing
    assert Reading(2.0, 2.5, 0.01, FEWEST - 1).verdict == "unknown"
    assert "unknown" in Reading(2.0, 2.5, 0.01, 3).told()


def test_without_held_out_data_the_training_data_is_the_probe(data):
    file = io.StringIO()
    train(recipe(data, held_out={}), console=Console(file=file, width=300))
    last = readings(data)[-1]
    assert last["image_use/verdict"] == "looks" and "held_out/loss" not in last
    assert "of the training data" in file.getvalue()
