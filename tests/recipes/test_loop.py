"""The loop: exact accumulation, frozen parts, resume, overfitting, faults."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import renderer, source, tiny_vlm, write_mixed, write_pictures
from torch import nn

from chiasm.data.loader import BatchPlan, load
from chiasm.data.mixture import Entry, Mixture
from chiasm.errors import CheckpointError
from chiasm.train import checkpoint
from chiasm.train.loop import Around, NotFinite, StageRun
from chiasm.train.objectives.next_token import next_token
from chiasm.train.recipe import Stage

QUIET = Console(file=io.StringIO())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def mixture(data: Path, seed: int = 0) -> Mixture:
    return Mixture({"colors": Entry(source=source(data))}, seed)


def run(vlm, data: Path, out: Path, resume: bool = False, seed: int = 0, **settings) -> StageRun:
    settings = {"name": "s", "plan": "instruct", "steps": 6, "batch_size": 3, "lr": 1e-3, "log_every": 1} | settings
    stage = StageRun(
        vlm.model,
        renderer(vlm, pack=settings.get("pack", False)),
        Stage(**settings),
        mixture(data),
        out,
        None,
        QUIET,
        Around(seed),
    )
    stage.fit(resume)
    return stage


def gradients(
    vlm, mixture: Mixture, out: Path, batch_size: int, accumulate: int, pack=False, norm: float = 1e9
) -> dict[str, torch.Tensor]:
    """The gradients of one whole step of four samples, cut into micro-batches in this way, clipped to ``norm``."""
    found = {}
    stage = StageRun(
        vlm.model,
        renderer(vlm, pack=pack),
        Stage(
            name="s",
            plan="end_to_end",
            steps=1,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=1e-3,
            max_grad_norm=norm,
        ),
        mixture,
        out / f"run{batch_size}{pack}",
        None,
        QUIET,
    )
    before = stage.update

    def keep(step, tally):
        result = before(step, tally)
        return result

    def zero_grad(**_):
        found.update({n: p.grad.clone() for n, p in stage.masters.masters.items() if p.grad is not None})

    weights = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    stage.update = lambda step, tally: _with(stage, zero_grad, lambda: keep(step, tally))
    stage.fit()
    with torch.no_grad():
        for n, p in vlm.model.named_parameters():
            p.copy_(weights[n])
            p.grad = None
    return found


def _with(stage, zero_grad, call):
    original, stage.optimizer.zero_grad = stage.optimizer.zero_grad, zero_grad
    try:
        return call()
    finally:
        stage.optimizer.zero_grad = original


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Samples of unequal lengths and media: a mean of means would differ."""
    vlm, mixed = tiny_vlm(tmp_path), write_mixed(tmp_path)
    whole, halves, single = (gradients(vlm, mixed, tmp_path, b, 4 // b) for b in (4, 2, 1))
    packed = gradients(vlm, mixed, tmp_path, 4, 1, pack=True)
    assert len(whole) > 20 and all(g.abs().max() > 0 for g in whole.values())
    for name, g in whole.items():
        for other in (halves, single, packed):
            assert (g - other[name]).abs().max() <= 1e-6, name
    counts = [int(renderer(vlm).sample(mixed[0, i]).loss_mask.sum()) for i in range(4)]
    assert len(set(counts)) == 4


def test_gradients_are_clipped_once_and_whole(tmp_path):
    """OpenFlamingo clips what was gathered so far after every micro-batch (F3): another direction than the step's."""
    vlm, mixed = tiny_vlm(tmp_path), write_mixed(tmp_path)
    free = gradients(vlm, mixed, tmp_path / "free", 4, 1)
    limit = float(torch.stack([g.norm() for g in free.values()]).norm()) / 3
    for batch in (4, 2, 1):
        clipped = gradients(vlm, mixed, tmp_path / f"clipped{batch}", batch, 4 // batch, norm=limit)
        for name, g in free.items():
            torch.testing.assert_close(clipped[name], g / 3, atol=1e-6, rtol=1e-4)
    vlm.model.requires_grad_(True)
    losses = [next_token(vlm.model, renderer(vlm).batch([mixed[0, i]])) for i in range(4)]
    for loss in losses:
        (loss.total / sum(other.weight for other in losses)).backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), limit)
    gathered = torch.cat([vlm.model.get_parameter(n).grad.flatten() for n in free])
    whole = torch.cat([g.flatten() for g in free.values()])
    apart = (gathered / gathered.norm() - whole / whole.norm()).norm()
    assert apart > 0.1, "the fault would be a thousand times what is allowed above"


def test_gradient_is_that_of_the_mean_over_target_tokens(tmp_path):
    vlm, mixed = tiny_vlm(tmp_path), write_mixed(tmp_path)
    found = gradients(vlm, mixed, tmp_path, 2, 2)
    batch = renderer(vlm).batch([mixed[0, i] for i in range(4)])
    logits = vlm.model(batch, logits="all").logits
    mask = batch.loss_mask[:, 1:]
    torch.nn.functional.cross_entropy(logits[:, :-1][mask], batch.input_ids[:, 1:][mask]).backward()
    for name, p in vlm.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_frozen_parts_do_not_move_and_trained_parts_do(data, tmp_path, dtype):
    vlm = tiny_vlm(tmp_path)
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    stage = run(vlm, data, tmp_path / "run", plan="align", dtype=dtype, warmup_ratio=0)
    for name, p in vlm.model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert p.dtype == torch.float32
        assert moved == name.startswith("connectors."), name
    assert {r.part: r.trainable for r in stage.plan.rows} == {
        "encoders.image": False,
        "connectors.image": True,
        "lm": False,
    }


def test_frozen_encoder_is_in_eval_mode_and_builds_no_graph(data, tmp_path):
    from chiasm.train.plan import apply, resolve

    vlm = tiny_vlm(tmp_path)
    apply(vlm.model, resolve(vlm.model, {"*": "train", "encoders": "freeze"}, 1e-3))
    assert not vlm.model.encoders["image"].training and vlm.model.lm.training
    output = vlm.model(renderer(vlm).batch([mixture(data)[0, 0]]))
    assert output.named["image/features"].x.grad_fn is None
    assert output.named["image/projected"].x.grad_fn is not None


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2, "bucket": 2, "workers": 1}, {"dtype": "bf16"}, {"dtype": "bf16", "optimizer": "muon"}],
)
def test_resume_is_bit_equal(data, tmp_path, settings):
    straight, broken = tiny_vlm(tmp_path), tiny_vlm(tmp_path)
    run(straight, data, tmp_path / "straight", **settings)
    settings = settings | {"save_every": 2}

    class Killed(Exception): ...

    def kill(vlm):
        stage = StageRun(
            vlm.model,
            renderer(vlm),
            Stage(
                **(
                    {"name": "s", "plan": "instruct", "steps": 6, "batch_size": 3, "lr": 1e-3, "log_every": 1}
                    | settings
                )
            ),
            *(mixture(data), tmp_path / "broken", None, QUIET),
        )
        update = stage.update

        def stop(step, tally):
            if step == 5:
                raise Killed
            return update(step, tally)

        stage.update = stop
        with pytest.raises(Killed):
            stage.fit()

    kill(broken)
    again = tiny_vlm(tmp_path)  # a new process has the model as it was at the start
    torch.manual_seed(1234)
    run(again, data, tmp_path / "broken", resume=True, **settings)
    for (name, a), (_, b) in zip(straight.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    logs = [(tmp_path / d / "log.jsonl").read_text().splitlines() for d in ("straight", "broken")]
    losses = [[__import__("json").loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resume_refuses_another_run(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    run(vlm, data, tmp_path / "run", save_every=2)
    with pytest.raises(CheckpointError, match="earlier run; resume"):
        run(tiny_vlm(tmp_path), data, tmp_path / "run", save_every=2)
    with pytest.raises(CheckpointError, match="stage"):
        run(tiny_vlm(tmp_path), data, tmp_path / "run", resume=True, save_every=2, lr=2e-3)
    with pytest.raises(CheckpointError, match="frozen"):
        run(tiny_vlm(tmp_path, seed=5), data, tmp_path / "run", resume=True, save_every=2)


def test_keep_last(data, tmp_path):
    from chiasm.train.checkpoint import checkpoints

    run(tiny_vlm(tmp_path), data, tmp_path / "run", save_every=1, keep_last=2)
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000004", "step-000005"]


def test_a_loss_that_is_no_number_stops_and_names_the_samples(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    vlm.model.connectors["image"].layers[0].weight.data[0, 0] = float("inf")
    with pytest.raises(NotFinite, match=r"step 1: the loss is nan; samples: p\d, p\d, p\d"):
        run(vlm, data, tmp_path / "run")


def test_a_batch_without_targets_gives_zero_not_nan(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    batch = renderer(vlm).batch([mixture(data)[0, 0]])
    batch.loss_mask[:] = False
    loss = next_token(vlm.model, batch)
    assert float(loss.total.detach()) == 0.0 and loss.weight == 0
    loss.total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in vlm.model.parameters())


def test_loss_by_source(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    both = Mixture({"a": Entry(source=source(data)), "b": Entry(source=source(data))})
    for pack in (False, True):
        batch = renderer(vlm, pack=pack).batch([both[0, 0], both[1, 3], both[0, 1]])
        loss = next_token(vlm.model, batch)
        alone = next_token(vlm.model, renderer(vlm).batch([both[1, 3]]))
        assert loss.parts["source/b"] == (pytest.approx(float(alone.total.detach()), rel=1e-5), alone.weight)
        assert sum(t for t, _ in loss.parts.values()) == pytest.approx(float(loss.total.detach()), rel=1e-5)


def test_log_holds_the_loss_of_each_source(data, tmp_path):
    """Also where every batch holds one source only."""
    import json

    vlm = tiny_vlm(tmp_path)
    both = Mixture({"a": Entry(source=source(data)), "b": Entry(source=source(data), weight=0.5)})
    stage = Stage(name="s", plan="align", steps=12, batch_size=1, lr=1e-9, log_every=12)
    StageRun(vlm.model, renderer(vlm), stage, both, tmp_path / "run", None, QUIET).fit()
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    sums = {}
    for name, number in (("a", 0), ("b", 1)):
        refs = [ref for ref in both.order(0).tolist() if ref[0] == number]
        losses = [next_token(vlm.model, renderer(vlm).batch([both[ref]])) for ref in refs]
        sums[name] = sum(float(x.total.detach()) for x in losses), sum(x.weight for x in losses)
        assert record[f"loss/source/{name}"] == pytest.approx(sums[name][0] / sums[name][1], rel=1e-4)
    assert record["loss"] == pytest.approx((sums["a"][0] + sums["b"][0]) / (sums["a"][1] + sums["b"][1]), rel=1e-4)


def test_bf16_keeps_float32_masters(data, tmp_path):
    """At this rate most steps are below bfloat16's spacing: without masters the weights would stand still."""
    vlm = tiny_vlm(tmp_path)
    before = vlm.model.lm.layers[0].mlp.fc1.weight if hasattr(vlm.model.lm.layers[0].mlp, "fc1") else None
    weight = before if before is not None else vlm.model.lm.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    run(vlm, data, tmp_path / "run", dtype="bf16", lr=1e-6, warmup_ratio=0, schedule="constant")
    change = (weight - start).abs()
    assert 0 < change.median() < 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_trained_model_is_whole_in_float32(data, tmp_path, stored, dtype):
    vlm = tiny_vlm(tmp_path).to(stored)
    run(vlm, data, tmp_path / "run", dtype=dtype, plan="align")
    assert {p.dtype for p in vlm.parameters()} == {torch.float32}
    assert isinstance(vlm.generate(list(mixture(data)[0, 0].messages[:1]), max_new_tokens=2), str)


def test_schedule_equals_transformers():
    transformers = pytest.importorskip("transformers")
    from chiasm.train.optim import factor

    parameter = torch.nn.Parameter(torch.zeros(1))
    for name in ("cosine", "linear"):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        schedule = make(optimizer, num_warmup_steps=math.ceil(50 * 0.1), num_training_steps=50)
        for step in range(50):
            assert factor(step, 50, 0.1, name) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            schedule.step()


def test_order_is_a_function_of_seed_epoch_and_place(data):
    plan = BatchPlan(mixture(data), batch_size=3, accumulate=2, bucket=2)
    specs = list(plan.specs(0, 6))
    assert [s.step for s in specs] == sorted(s.step for s in specs)
    assert list(plan.specs(3, 6)) == [s for s in specs if s.step >= 3]
    first, second = ([r for s in specs if s.epoch == e for r in s.refs] for e in (0, 1))
    assert sorted(first) == sorted(second) == [(0, i) for i in range(8)] and first != second
    assert list(BatchPlan(mixture(data, 1), 3, 2, 2).specs(0, 6)) != specs


def test_workers_do_not_change_the_order(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    plan = BatchPlan(mixture(data), 3)
    runs = [[b.ids for _, b in load(plan, renderer(vlm), 1, 5, workers)] for workers in (0, 2)]
    assert runs[0] == runs[1] and len(runs[0]) == 4


def test_overfits_eight_samples_and_stops(data, tmp_path):
    """Greedy decoding gives the answers back, and the end token after them."""
    vlm = tiny_vlm(tmp_path)
    run(vlm, data, tmp_path / "run", plan="end_to_end", steps=150, batch_size=8, lr=4e-3, warmup_ratio=0.05)
    for index in range(4):
        example = mixture(data)[0, index]
        prompt = vlm.processor(list(example.messages[:1]), id=example.id, add_generation_prompt=True)
        ids = []
        while len(ids) < 30 and (not ids or ids[-1] not in vlm.processor.stop_ids):
            batch = vlm.processor.collate([prompt])
            token = int(vlm.model(batch, logits="last").logits.argmax())
            ids.append(token)
            prompt.input_ids = torch.cat([prompt.input_ids, torch.tensor([token])])
            prompt.loss_mask = torch.cat([prompt.loss_mask, torch.tensor([False])])
        assert ids[-1] in vlm.processor.stop_ids
        assert vlm.processor.decode(ids).strip() == example.messages[1].text


def test_the_mark_reads_a_tensor_of_any_size():
    """28,311,552 (49,152 x 576, a published embedding): float32 has no such place as its last one."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1).expand(28_311_552))  # one number in memory
    first = checkpoint.digest(model, {"weight": None})
    model.weight = nn.Parameter(torch.ones(1).expand(28_311_552))
    assert checkpoint.digest(model, {"weight": None}) != first
