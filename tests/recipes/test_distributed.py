"""Several ranks: the step of one process however its samples are dealt, no hang, checkpoints, evaluation, watchdog."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import launch
from rich.console import Console
from tiny_run import COLORS, model_config, renderer, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.data.loader import BatchPlan, deal
from chiasm.data.mixture import Entry, Mixture
from chiasm.data.quarantine import BadSamples
from chiasm.errors import ChiasmError, DataError
from chiasm.eval.runner import evaluate
from chiasm.train import distributed
from chiasm.train.distributed import ALONE, RankError, whole
from chiasm.train.loop import Around, StageRun
from chiasm.train.objectives import objective
from chiasm.train.probe import Probe
from chiasm.train.recipe import Recipe, Stage
from chiasm.train.run import train

QUIET = Console(file=io.StringIO())
MODES = ["replicate", "shard"]

# Each pair is a step of two ranks: both have pictures, either, neither, unequal many; the last step has one sample.
KINDS = [1, 1, 1, 0, 0, 2, 0, 0, 2, 1, 0]


class InOrder(Mixture):
    """Examples in the order they stand in the file, so that a test says which rank has pictures."""

    def order(self, epoch: int) -> torch.Tensor:
        return torch.tensor([[0, i] for i in range(len(self))])


def samples(folder: Path, kinds: list[int] = KINDS, bad: int | None = None, sizes=((16, 16),)) -> Mixture:
    """Samples with so many pictures each, and answers of unequal length; the picture of ``bad`` is missing."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for i, pictures in enumerate(kinds):
        names = [f"{i}-{k}.png" for k in range(pictures)]
        for k, name in enumerate(names):
            if i != bad:
                Image.new("RGB", sizes[(i + k) % len(sizes)], list(COLORS.values())[(i + k) % 4]).save(
                    folder / "pictures" / name
                )
        turns = [
            {"from": "human", "value": "<image>" * pictures + f"What is it? {i}"},
            {"from": "gpt", "value": "red" * (1 + i % 4)},
        ]
        record = {"id": f"s{i}", "conversations": turns}
        records.append(record | ({"image": names if pictures > 1 else names[0]} if names else {}))
    (folder / "samples.json").write_text(json.dumps(records))
    return InOrder({"mixed": Entry(source=source(folder) | {"file": str(folder / "samples.json")})})


class Kept(StageRun):
    """Keeps the gradients of every step, whole."""

    def update(self, step: int, tally: Any) -> Any:
        if step == self.stop_at:
            raise KeyboardInterrupt
        if not hasattr(self, "kept"):
            self.kept: list[dict[str, torch.Tensor]] = []
            self.optimizer.register_step_pre_hook(lambda *_: self.keep())
        return super().update(step, tally)

    def keep(self) -> None:
        named = self.masters.masters.items()
        self.kept.append({n: whole(p.grad).clone() for n, p in named if p.grad is not None})

    stop_at = -1


def stage(batch: int, accumulate: int, **settings: Any) -> Stage:
    usual = {"plan": "end_to_end", "steps": 6, "lr": 1e-3, "warmup_ratio": 0.0, "log_every": 1, "proof": "tell"}
    settings = usual | settings
    return Stage(name="s", batch_size=batch, accumulate=accumulate, **settings)


def run(folder: Path, ranks: Any, kinds: list[int] = KINDS, resume=False, stop_at=-1, bad=None, skip=None, **settings):
    """A run of the tiny model on ``ranks``; gives its gradients by step and its weights."""
    own = folder / f"rank{ranks.rank}"
    config, sizes = settings.pop("config", None), settings.pop("sizes", ((16, 16),))
    mixture = samples(own, kinds, bad, sizes)
    vlm = tiny_vlm(own, config=config)
    settings = {"batch": 2, "accumulate": 1} | settings
    done = Kept(
        *(vlm.model, renderer(vlm), stage(**settings), mixture, folder / "run"),
        console=QUIET,
        around=Around(bad=BadSamples(do="skip", cap=skip) if skip else BadSamples(), ranks=ranks),
    )
    done.stop_at = stop_at
    try:
        done.fit(resume)
    except KeyboardInterrupt:
        return None
    return {"gradients": done.kept, "weights": {n: w.clone() for n, w in vlm.model.state_dict().items()}}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((float((a[n] - b[n]).abs().max()) for n in a if a[n].numel()), default=0.0)


# ------------------------------------------------------------------------------------------------------------- dealing


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("left", [1, 5, 8, 12])
def test_every_sample_of_a_step_goes_to_one_rank(accumulate: int, ranks: int, left: int):
    size = 3
    refs = [(0, i) for i in range(min(left, size * accumulate))]
    parts = [tuple(refs[i : i + size]) for i in range(0, len(refs), size)]
    shares = [deal(parts, accumulate, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1, "all ranks meet equally often"
    dealt = [(place + k, ref) for share in shares for part, place in share for k, ref in enumerate(part)]
    assert sorted(dealt) == list(enumerate(refs))


def test_ranks_share_an_epoch_from_any_step(tmp_path: Path):
    plan = BatchPlan(samples(tmp_path), 2, 2)
    alone = list(itertools.chain(*(spec.refs for spec in plan.specs(0, 3))))
    both = [list(plan.specs(0, 3, rank, 2)) for rank in range(2)]
    assert sorted(ref for specs in both for spec in specs for ref in spec.refs) == sorted(alone)
    assert list(plan.specs(2, 3, 1, 2)) == [spec for spec in both[1] if spec.step == 2]


# ----------------------------------------------------------------------------------------------------- one step is one

CUTS = [(2, 1), (1, 2), (8, 1), (2, 4)]  # batch_size, accumulate


def cut_in_every_way(folder: Path, mode: str, cuts: list[tuple[int, int]], plans: list[str]) -> dict[Any, Any]:
    found = {}
    with distributed.started("cpu", mode, patience=150) as ranks:
        for i, (batch, accumulate) in enumerate(cuts):
            for plan in plans:
                steps = 6 if batch * accumulate == 2 else 2
                settings = {"batch": batch, "accumulate": accumulate, "plan": plan, "steps": steps}
                found[batch, accumulate, plan] = run(folder / f"{i}{plan}", ranks, **settings)
    return found


def compare(folder: Path, count: int, mode: str, cuts: list[tuple[int, int]], plans: list[str]) -> None:
    results = launch(count, cut_in_every_way, folder / "many", mode, cuts, plans)
    alone = launch(1, cut_in_every_way, folder / "one", mode, cuts, plans)[0]
    for key, expected in alone.items():
        for result in results:
            assert len(result[key]["gradients"]) == len(expected["gradients"])
            for step, (got, wanted) in enumerate(zip(result[key]["gradients"], expected["gradients"], strict=True)):
                assert apart(got, wanted) <= 1e-6, (key, step)
            assert apart(result[key]["weights"], results[0][key]["weights"]) == 0, "the ranks' models are the same"


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_take_the_step_of_one(tmp_path: Path, mode: str):
    compare(tmp_path, 2, mode, CUTS, ["end_to_end"])


def of_several_sizes(folder: Path, mode: str) -> Any:
    config = model_config()
    front = {"type": "proportional", "placeholder": "<image>", "shortest_edge": 16, "multiple": 8}
    config["processing"]["media"]["image"] = front
    sizes = ((16, 16), (16, 32), (32, 16))
    with distributed.started("cpu", mode, patience=60) as ranks:
        return run(folder, ranks, [2, 1, 3, 0, 1, 1], steps=3, config=config, sizes=sizes)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_sizes_that_only_one_rank_has(tmp_path: Path, mode: str):
    """Sizes are encoded one after the other: a rank with fewer of them keeps the meetings of the others."""
    found = launch(2, of_several_sizes, tmp_path / "many", mode)
    alone = launch(1, of_several_sizes, tmp_path / "one", "replicate")[0]
    for step, wanted in enumerate(alone["gradients"]):
        for result in found:
            assert apart(result["gradients"][step], wanted) <= 1e-6, step


@pytest.mark.parametrize("mode", MODES)
def test_parts_that_only_some_ranks_use(tmp_path: Path, mode: str):
    """Frozen towers and language models: with ``align`` a rank of texts alone has nothing to learn from."""
    compare(tmp_path, 2, mode, [(2, 1)], ["align", "instruct"])


def test_four_accumulations_are_one_batch(tmp_path: Path):
    found = launch(1, cut_in_every_way, tmp_path, "replicate", [(8, 1), (2, 4)], ["end_to_end"])[0]
    one, four = (found[8, 1, "end_to_end"], found[2, 4, "end_to_end"])
    assert max(apart(a, b) for a, b in zip(one["gradients"], four["gradients"], strict=True)) <= 1e-6


def in_bf16(folder: Path) -> Any:
    with distributed.started("cpu", "shard", patience=150) as ranks:
        return run(folder / "run", ranks, dtype="bf16", steps=5)


def test_pieces_in_float32_compute_in_bfloat16(tmp_path: Path):
    """Masters, gradients' sums and moments stay float32; what a block computes with is bfloat16."""
    found = launch(2, in_bf16, tmp_path / "low")[0]
    exact = launch(1, cut_in_every_way, tmp_path / "high", "replicate", [(2, 1)], ["end_to_end"])[0][2, 1, "end_to_end"]
    got, wanted = (torch.cat([g.flatten() for g in r["gradients"][0].values()]) for r in (found, exact))
    assert got.dtype == torch.float32
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_four_ranks_take_the_step_of_one(tmp_path: Path, mode: str):
    compare(tmp_path, 4, mode, [(2, 1), (8, 1), (2, 4)], ["end_to_end", "align"])


# --------------------------------------------------------------------------------------------------------- checkpoints


def in_halves(folder: Path, mode: str, half: str) -> Any:
    with distributed.started("cpu", mode, patience=150) as ranks:
        settings = {"save_every": 3} | ({"resume": True} if half == "second" else {})
        return run(folder.parent / "shared", ranks, stop_at=4 if half == "first" else -1, **settings)


@pytest.mark.parametrize("first", [(2, "shard"), (2, "replicate"), (1, "replicate")])
@pytest.mark.parametrize("second", [(2, "shard"), (1, "replicate")])
def test_saved_on_some_ranks_resumed_on_others(tmp_path: Path, first: Any, second: Any):
    expected = launch(1, alone, tmp_path / "alone")[0]
    launch(first[0], in_halves, tmp_path / "first", first[1], "first")
    saved = tmp_path / "shared" / "run" / "checkpoints" / "step-000003"
    assert (saved / "pieces").is_dir() == (first[1] == "shard")
    for result in launch(second[0], in_halves, tmp_path / "second", second[1], "second"):
        assert len(result["gradients"]) == 3, "steps 4 to 6"
        for got, wanted in zip(result["gradients"], expected["gradients"][3:], strict=True):
            assert apart(got, wanted) <= 1e-6
    if first == second:
        whole_way = launch(*(second[0], in_halves), tmp_path / "again" / "x", second[1], "whole")[0]
        assert apart(result["weights"], whole_way["weights"]) == 0, "bit by bit on as many ranks"
    log = (tmp_path / "shared" / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]


def alone(folder: Path) -> Any:
    return run(folder, ALONE)


# ------------------------------------------------------------------------------------------------------------- faults


def with_a_bad_sample(folder: Path) -> Any:
    with distributed.started("cpu", "replicate", patience=150) as ranks:
        with pytest.raises(DataError) as caught:
            run(folder / "stop", ranks, bad=5)
        skipped = run(folder / "skip", ranks, bad=5, skip=1)
        with pytest.raises(ChiasmError, match="the weights of rank 1"):
            ranks.alike("the weights", str(ranks.rank))
        return str(caught.value), skipped


def test_a_bad_sample_of_one_rank_stops_or_is_skipped_by_all(tmp_path: Path):
    (first, skipped), (second, also) = launch(2, with_a_bad_sample, tmp_path)
    assert first == second and "s5" in first
    assert apart(skipped["weights"], also["weights"]) == 0
    lines = (tmp_path / "skip" / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["s5"]


def late(folder: Path) -> list[str]:
    told: list[str] = []
    with distributed.started("cpu", "replicate", patience=0.4) as ranks:
        ranks.watchdog.end = told.append
        ranks.watchdog.at("opening a slow file")
        time.sleep(2 * ranks.rank)
        ranks.wait("the batch of step 7")
    return told


def test_the_watchdog_says_which_rank_waits_where(tmp_path: Path):
    waiting, busy = launch(2, late, tmp_path)
    assert len(waiting) == 1 and not busy
    assert "rank 0 has waited for 0.4 s at the batch of step 7" in waiting[0]
    assert "rank 1: is busy with opening a slow file" in waiting[0]


def test_a_rank_whose_other_ended_says_where_to_look():
    gloo = "[transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:20378. This is typically caused by ..."
    match = r"rank 1: another rank ended in the middle of the run .* look there first"
    with pytest.raises(RankError, match=match), distributed.told_apart(1):
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="shapes"), distributed.told_apart(1):
        raise RuntimeError("shapes cannot be multiplied")


# ---------------------------------------------------------------------------------------------------------- whole runs


def answers(folder: Path) -> Any:
    vlm = tiny_vlm(folder / str(time.time_ns()))
    mixture = samples(folder / str(time.time_ns()), [1] * 7)
    examples = [mixture[ref] for ref in mixture.first()]
    with distributed.started("cpu") as ranks:
        result = evaluate(vlm, examples, batch_size=2, max_new_tokens=4, ranks=ranks if ranks.count > 1 else None)
        return [vars(answer) for answer in result.answers]


def test_an_evaluation_is_shared(tmp_path: Path):
    expected = launch(1, answers, tmp_path / "one")[0]
    assert [a["id"] for a in expected] == [f"s{i}" for i in range(7)]
    for found in launch(2, answers, tmp_path / "two"):
        assert found == expected


def recipe(folder: Path, mode: str, **last: Any) -> Recipe:
    data = {"colors": {"source": source(folder)}}
    stages = [
        {"name": "a", "plan": "align", "steps": 2, "batch_size": 4, "lr": 1e-3, "warmup_ratio": 0.0},
        {"name": "b", "plan": "instruct", "steps": 2, "batch_size": 4, "lr": 1e-4, "warmup_ratio": 0.0} | last,
    ]
    model = {"config": model_config(), "tokenizer": str(folder / "tokenizer")}
    return Recipe.parse(
        {
            "model": model,
            "data": data,
            "held_out": data,
            "stages": stages,
            "parallel": mode,
            "device": "cpu",
            "out": str(folder / "out"),
            "eval": {"limit": 4, "max_new_tokens": 3, "loss_samples": 4},
        }
    )


def whole_run(folder: Path, mode: str) -> Any:
    vlm = train(recipe(folder.parent, mode), console=None)
    return {name: w.clone() for name, w in vlm.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_recipe_under_torchrun(tmp_path: Path, mode: str):
    from chiasm.vlm import load

    write_pictures(tmp_path)
    tokenizer_folder(tmp_path / "tokenizer")
    first, second = launch(2, whole_run, tmp_path / "ranks", mode)
    assert apart(first, second) == 0
    saved = load(tmp_path / "out" / "model")
    assert apart(first, dict(saved.state_dict())) == 0, "the model is an ordinary folder"
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "out" / "report.html").is_file()
    proof = json.loads((tmp_path / "out" / "b" / "proof.json").read_text())
    assert proof["verdict"] in ("proved", "open")


def run_with_best(folder: Path, mode: str, dtype: str) -> Any:
    last = {"steps": 3, "lr": 1e-2, "eval_every": 1, "dtype": dtype}
    vlm = train(recipe(folder.parent, mode, **last), console=None)
    return {name: w.clone() for name, w in vlm.state_dict().items()}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("shard", "bf16"), pytest.param("shard", "float32", marks=SLOW), pytest.param("replicate", "bf16", marks=SLOW)],
)
def test_the_best_model_of_several_ranks_is_whole(tmp_path: Path, mode: str, dtype: str):
    """Written while the model is in pieces: an ordinary folder, with every tensor, of the step that the log names."""
    from chiasm.convert.io import open_weights
    from chiasm.vlm import load

    write_pictures(tmp_path)
    tokenizer_folder(tmp_path / "tokenizer")
    last, _ = launch(2, run_with_best, tmp_path / "ranks", mode, dtype)
    folder = tmp_path / "out" / "b" / "best"
    best = load(folder)
    assert not list(folder.parent.glob(".best*"))
    known = json.loads((folder / "held_out.json").read_text())
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["held_out/loss"] for r in log if "held_out/loss" in r}
    assert known == {"step": min(losses, key=lambda step: (losses[step], step)), "loss": min(losses.values())}
    saved = open_weights(folder)
    assert {name: saved.info[name].shape for name in saved.info} == {n: tuple(w.shape) for n, w in last.items()}
    assert all(saved.read(name).dtype == torch.float32 for name in saved.info)
    first = load(tmp_path / "out" / "a" / "model").state_dict()
    kept = dict(best.state_dict())
    assert apart({n: w for n, w in kept.items() if n.startswith("encoders")},
                 {n: w for n, w in first.items() if n.startswith("encoders")}) == 0, "frozen"  # fmt: skip
    assert apart(kept, first) > 1e-3, "what was learned"
    if known["step"] == 3:
        assert apart(kept, last) == 0, "what the stage ended with"
    # Measured again, with the weights that were written.
    examples = Mixture({"colors": Entry(source=source(tmp_path))})
    chosen = [examples[number, index] for number, index in examples.order(0)[:4].tolist()]
    probe = Probe(best.model, renderer(best), objective("next_token"), chosen, 4)
    assert probe()["held_out/loss"] == pytest.approx(known["loss"], rel=1e-5 if dtype == "float32" else 3e-2)
