"""Runs that are killed end in the same bits: at random moments, inside saves, with every kind of random state."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tiny_run import model_config, renderer, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.cli import main
from chiasm.data.base import Example
from chiasm.data.loader import BatchPlan, load
from chiasm.data.mixture import Entry, Mixture
from chiasm.data.randomness import forked, placed, restore, state
from chiasm.train import checkpoint
from chiasm.train.loop import StageRun
from chiasm.train.recipe import Recipe, Stage
from chiasm.train.run import train
from chiasm.train.selftest import PRELOAD, compare, selftest

QUIET = Console(file=io.StringIO())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def recipe(data: Path, **changes) -> Recipe:
    first = {"name": "a", "plan": "align", "steps": 2, "lr": 1e-3, "batch_size": 2, "save_every": 1}
    second = {"name": "b", "plan": "instruct", "steps": 4, "lr": 1e-3, "batch_size": 1, "accumulate": 2, "bucket": 2}
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "stages": [first, second | {"save_every": 1, "log_every": 1}],
        "out": str(data / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values | changes)


# ---------------------------------------------------------------------------------------------------------------- kills


def test_three_kills_at_random_moments_end_in_the_same_bits(data):
    outcome = selftest(recipe(data), data / "self", runs=2, steps=4, seed=3, most_kills=2)
    assert outcome.equal, outcome.differences
    assert len(outcome.kills) >= 1 and outcome.runs == 2
    assert outcome.tensors > 40 and not (data / "self" / "straight").exists()


@pytest.mark.slow
def test_thirty_kills_at_random_moments_are_thirty_bit_equal_ends(data):
    outcome = selftest(recipe(data), data / "self", runs=30, steps=6, seed=1, most_kills=1)
    assert outcome.equal, outcome.differences
    assert outcome.runs == 30 and len(outcome.kills) >= 28  # a kill drawn for the very end may come too late
    more = selftest(recipe(data), data / "more", runs=5, steps=6, seed=2, most_kills=6)
    assert more.equal, more.differences  # whether a kill meets a save is chance; see the file operations below


def _operations(data: Path) -> int:
    """The file operations of an undisturbed run, whose result stays in ``straight``."""
    _killed(data, 10**9, "straight")
    return int((data / "straight" / "operations").read_text())


def _killed(data: Path, point: int, name: str) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from kill_run import work

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    (data / name).mkdir(exist_ok=True)
    values = recipe(data, out=str(data / name)).dump()
    process = context.Process(target=work, args=(values, point, str(data / name)))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def test_a_kill_between_any_two_file_operations_of_a_save_changes_nothing(data):
    """Four moments, spread over the operations of the run: before and after writes, flushes, moves, removals."""
    total = 2 * _operations(data)
    assert total > 60
    for point in (5, total // 3, total - 4):
        _kill_and_compare(data, point)


@pytest.mark.slow
def test_a_kill_around_every_file_operation_changes_nothing(data):
    for point in range(0, 2 * _operations(data), 3):
        _kill_and_compare(data, point)


def _kill_and_compare(data: Path, point: int) -> None:
    name = f"killed-{point}"
    assert _killed(data, point, name) == -signal.SIGKILL
    train(recipe(data, out=str(data / name)), resume=True, console=QUIET)
    assert compare(data / "straight", data / name) == []
    assert not list((data / name).glob("*/checkpoints"))


# ---------------------------------------------------------------------------------------------- what a checkpoint keeps


def stage_run(vlm, data: Path, out: Path, mixture=None, probe=None, **settings) -> StageRun:
    settings = {"name": "s", "plan": "instruct", "steps": 6, "batch_size": 2, "lr": 1e-3, "log_every": 1} | settings
    mixture = mixture or Mixture({"colors": Entry(source=source(data))}, 0)
    return StageRun(vlm.model, renderer(vlm), Stage(**settings), mixture, out, probe, QUIET)


class Killed(Exception):
    pass


def broken_off(run: StageRun, at: int) -> None:
    update = run.update

    def stop(step, tally):
        if step == at:
            raise Killed
        return update(step, tally)

    run.update = stop
    with pytest.raises(Killed):
        run.fit()


class Augmented:
    """A mixture whose samples draw from every global generator while they are made."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, ref) -> Example:
        example = self.inner[ref]
        drawn = f" {random.randrange(1000)} {np.random.randint(1000)} {int(torch.randint(1000, ()))}"
        messages = list(example.messages)
        from dataclasses import replace

        from chiasm.types import Text

        messages[-1] = replace(messages[-1], parts=(Text(messages[-1].text + drawn),))
        return replace(example, messages=tuple(messages))

    def only(self, names):
        return self

    def __reduce__(self):
        return Augmented, (self.inner,)


def test_random_data_depends_on_the_place_alone(data, tmp_path):
    """Not on workers, on what was made before, on the start, nor on the state of the global generators."""
    vlm = tiny_vlm(tmp_path)
    plan = BatchPlan(Augmented(Mixture({"colors": Entry(source=source(data))}, 0)), 2, 2)
    made = []
    for start, workers in ((0, 0), (2, 0), (0, 2), (2, 2)):
        random.seed(start)
        torch.manual_seed(workers)
        made.append([(s.step, b.input_ids) for s, b in load(plan, renderer(vlm), start, 5, workers) if s.step >= 2])
    for other in made[1:]:
        assert len(other) == len(made[0]) >= 4
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(made[0], other))
    texts = {tuple(x.flatten().tolist()) for _, x in made[0]}
    assert len(texts) == len(made[0])


def test_dropout_python_and_numpy_go_on_where_they_were(data, tmp_path):
    def prepared(vlm):
        def noise(module, inputs, output):
            factor = 1 + 0.01 * (random.random() + random.gauss(0, 1) + float(np.random.normal()))
            return torch.nn.functional.dropout(output * factor, 0.1, training=module.training)

        vlm.model.connectors["image"].layers[0].register_forward_hook(noise)
        return vlm

    straight, broken, again = (prepared(tiny_vlm(tmp_path)) for _ in range(3))
    random.seed(5)
    stage_run(straight, data, tmp_path / "straight", save_every=2).fit()
    random.seed(6)
    np.random.seed(7)
    broken_off(stage_run(broken, data, tmp_path / "broken", save_every=2), 5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    stage_run(again, data, tmp_path / "broken", save_every=2).fit(resume=True)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for (name, a), (_, b) in zip(straight.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_states_go_out_and_come_back():
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.normal()
    kept = state()
    wanted = (random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3))
    random.random()
    torch.rand(7)
    restore(kept)
    found = (random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3))
    assert found[:4] == wanted[:4] and torch.equal(found[4], wanted[4])
    for context in (forked(3), placed("a", 1)):
        kept = state()
        with context:
            random.random(), np.random.rand(), torch.rand(1)
        assert all(torch.equal(a, b) for a, b in zip(kept.values(), state().values()))
    with placed("a", 1):
        one = (random.random(), np.random.rand(), float(torch.rand(())))
    with placed("a", 2):
        two = (random.random(), np.random.rand(), float(torch.rand(())))
    with placed("a", 1):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == one
    assert all(a != b for a, b in zip(one, two))


def test_half_a_checkpoint_is_ignored_and_removed(data, tmp_path):
    out = tmp_path / "run"
    broken_off(stage_run(tiny_vlm(tmp_path), data, out, save_every=2), 5)
    folder = out / "checkpoints"
    half = folder / ".step-000006.123"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    (folder / ".step-000002.old.7").mkdir()
    (folder / "step-000006").mkdir()  # a name without a state: no checkpoint either
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-000002", "step-000004"]
    again = tiny_vlm(tmp_path)
    stage_run(again, data, out, save_every=2).fit(resume=True)
    assert not list(folder.glob(".step-*"))
    straight = tiny_vlm(tmp_path)
    stage_run(straight, data, tmp_path / "straight", save_every=2).fit()
    for (name, a), (_, b) in zip(straight.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_newest_and_the_best_are_kept(data, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.7, 2.8])
    run = stage_run(
        *(tiny_vlm(tmp_path), data, tmp_path / "run", None, lambda: {"held_out/loss": next(losses)}),
        **{"save_every": 1, "eval_every": 1, "keep_last": 2},
    )
    run.fit()
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-000002", "step-000004", "step-000005"]
    assert checkpoint.best(folder) == folder / "step-000002"
    assert json.loads((folder / "step-000002" / "state.json").read_text())["held_out"] == 1.0


def test_log_and_skips_survive_a_cut_last_line(data, tmp_path):
    out = tmp_path / "run"
    broken_off(stage_run(tiny_vlm(tmp_path), data, out, save_every=2), 5)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (out / "skipped.jsonl").write_text('{"source": "colors", "index": 1, "id": "p1", "step": 1}\n{"source": "col')
    stage_run(tiny_vlm(tmp_path), data, out, save_every=2).fit(resume=True)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_equal(data, tmp_path):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(data).dump()))
    result = CliRunner().invoke(
        main, ["selftest", "resume", str(path), "--runs", "1", "--kills", "1", "--steps", "2", "out=unused"]
    )
    assert result.exit_code == 0, result.output
    assert "bit-equal" in result.output and "1 runs" in result.output
    assert not (tmp_path / "run").exists() and not os.path.exists("unused")


def test_a_difference_is_named(data, tmp_path):
    train(recipe(data, out=str(data / "one")), console=QUIET)
    train(recipe(data, out=str(data / "two"), seed=1), console=QUIET)
    found = compare(data / "one", data / "two")
    assert "tensors differ" in found[0] and "stage" in found[1] and "step" in found[1]
