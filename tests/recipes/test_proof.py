"""Proofs of training: every planted fault is caught and named, and nothing is said of a run that is right."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import model_config, renderer, source, tiny_vlm, tokenizer_folder, write_pictures

from chiasm.data.loader import load
from chiasm.data.mixture import Entry, Mixture
from chiasm.train.loop import NotFinite, StageRun
from chiasm.train.marks import marks
from chiasm.train.masks import check_masks
from chiasm.train.proof import PATIENCE, Proof, ProofError, frozen_tensors, kinds_of, never_run
from chiasm.train.recipe import Recipe, Stage
from chiasm.train.run import train
from chiasm.types import Batch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def stage_run(vlm, data: Path, out: Path, console: Console | None = None, **settings) -> StageRun:
    settings = {"name": "s", "plan": "instruct", "steps": 4, "batch_size": 3, "lr": 1e-3, "log_every": 1} | settings
    mixture = Mixture({"colors": Entry(source=source(data))}, 0)
    return StageRun(
        *(vlm.model, renderer(vlm, pack=settings.get("pack", False)), Stage(**settings), mixture, out, None),
        console or Console(file=io.StringIO(), width=160),
    )


def recipe(data: Path, **changes) -> Recipe:
    values = {
        "model": {"config": model_config(), "tokenizer": str(tokenizer_folder(data / "tokenizer"))},
        "data": {"colors": {"source": source(data)}},
        "stages": [{"name": "s", "plan": "instruct", "steps": 4, "batch_size": 3, "lr": 1e-3, "log_every": 1}],
        "out": str(data / "run"),
        "device": "cpu",
    }
    return Recipe.parse(values | changes)


# ------------------------------------------------------------------------------------------------- a run that is right


@pytest.mark.parametrize("settings", [{}, {"dtype": "bf16"}, {"plan": "align"}, {"plan": "end_to_end", "pack": True}])
def test_a_right_run_is_proved(data, tmp_path, settings):
    file = io.StringIO()
    run = stage_run(tiny_vlm(tmp_path), data, tmp_path / "run", Console(file=file, width=160), **settings)
    run.fit()
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == "proved" and told["open"] == {}
    assert told["first"] == 2  # the first step of the warm-up has a rate of 0, so nothing can have moved before
    rows = {(p["part"], p["plan"]): p for p in told["parts"]}
    assert sum(p["parameters"] for p in rows.values()) == sum(p.numel() for p in run.model.parameters())
    for p in rows.values():
        assert p["holds"]
        assert p["changed"] == (0 if p["plan"] == "freeze" else p["tensors"] - p["unused"])
        judged = p["tensors"] - p["unused"] - p["without_effect"]
        assert p["gradients"] == (0 if p["plan"] == "freeze" else judged)
    assert ("connectors.image", "train") in rows
    assert "proved" in file.getvalue() and "Proof after step 2" in file.getvalue()


def test_what_never_runs_is_listed_and_no_fault(data, tmp_path):
    config = model_config()
    config["model"]["encoders"]["image"] |= {"layer": -2, "post_norm": "unused"}
    vlm = tiny_vlm(tmp_path)
    from chiasm.vlm import build

    vlm = build(config, tokenizer=tmp_path / "tokenizer")
    stage_run(vlm, data, tmp_path / "run", plan="end_to_end").fit()
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == "proved"
    assert told["unused"] == sorted(f"encoders.image.{n}" for n in vlm.model.encoders["image"].unused())
    assert {n.split(".")[2] for n in told["unused"]} == {"blocks", "post_norm"}


def test_a_stage_without_a_learning_rate_is_open_not_proved(data, tmp_path):
    stage_run(tiny_vlm(tmp_path), data, tmp_path / "run", steps=1).fit()  # the only step is the warm-up's, at rate 0
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == "open"
    assert "warmup_ratio" in told["open"]["connectors.image.layers.0.weight"]


def test_text_alone_leaves_the_connector_open_until_every_sample_was_seen(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    records = json.loads((data / "train.json").read_text())
    for record in records:
        del record["image"]
        record["conversations"] = [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": record["id"]}]
    (data / "train.json").write_text(json.dumps(records))
    stage_run(vlm, data, tmp_path / "short", steps=2).fit()
    told = json.loads((tmp_path / "short" / "proof.json").read_text())
    assert told["verdict"] == "open"
    assert told["open"]["connectors.image.layers.0.weight"] == "no image came"
    with pytest.raises(
        ProofError, match=r"4 of \d+ trained tensors had no gradient .*no image came .* freeze the part"
    ):
        stage_run(vlm, data, tmp_path / "long", steps=8).fit()


def test_a_zero_start_is_given_time(tmp_path):
    """The first factor of a low-rank update has a gradient of 0 until the second, which starts at 0, has moved."""
    model = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(torch.zeros(3, 3) if n else torch.randn(3, 3)) for n in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    proof = Proof("s", model, dict(model.named_parameters()), epoch=100)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (model.b @ model.a @ torch.ones(3, 1) - 1).square().sum().backward()
        proof.gradients()
        optimizer.step()
        proof.stepped(step, 1.0)
    assert proof.first == 2 and proof.finish(3).verdict == "proved"


def test_a_gradient_that_stays_zero_is_a_fault():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.randn(3))
    proof = Proof("s", model, dict(model.named_parameters()), epoch=100)
    for step in range(1, PATIENCE + 1):
        model.a.grad = torch.zeros(3)
        proof.gradients()
        proof.stepped(step, 1.0)
    with pytest.raises(ProofError, match="each value of their gradient is 0"):
        proof.stepped(PATIENCE + 1, 1.0)


# ------------------------------------------------------------------------------------------------------ planted faults


def test_a_detached_connector_is_caught_after_the_first_step(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    layer = vlm.model.connectors["image"].layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    run = stage_run(vlm, data, tmp_path / "run", steps=50)
    with pytest.raises(ProofError, match=r"after step 1: 2 of .*no gradient \(connectors.image.layers.0.*detach"):
        run.fit()
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["verdict"] != "proved"


def test_a_fault_can_be_told_without_a_stop(data, tmp_path):
    vlm, file = tiny_vlm(tmp_path), io.StringIO()
    vlm.model.connectors["image"].layers[0].register_forward_hook(lambda m, i, output: output.detach())
    stage_run(vlm, data, tmp_path / "run", Console(file=file, width=160), proof="tell").fit()
    assert file.getvalue().count("Proof failed:") == 1 and "connectors.image.layers.0" in file.getvalue()
    assert json.loads((tmp_path / "run" / "proof.json").read_text())["verdict"] in ("open", "failed")


def test_a_connector_switched_off_after_the_plan_is_caught(data, tmp_path, monkeypatch):
    from chiasm.train import loop

    apply = loop.apply

    def sabotaged(model, plan, *rest):
        apply(model, plan, *rest)
        model.connectors.requires_grad_(False)

    monkeypatch.setattr(loop, "apply", sabotaged)
    with pytest.raises(ProofError, match=r"4 of .*connectors.image.*requires_grad was switched off"):
        stage_run(tiny_vlm(tmp_path), data, tmp_path / "run").fit()


def test_a_plan_that_freezes_a_random_connector_is_caught(data):
    stage = {"name": "s", "plan": {"*": "train", "encoders": "freeze", "conn*": "freeze"}, "steps": 3, "lr": 1e-3}
    with pytest.raises(ProofError, match=r"connectors.image is frozen at random values: none of its 4 tensors"):
        train(recipe(data, stages=[stage]), console=Console(file=io.StringIO()))


def test_a_connector_trained_before_may_be_frozen(data):
    first = {"name": "a", "plan": "align", "steps": 2, "lr": 1e-3, "batch_size": 2}
    second = {"name": "b", "plan": {"*": "freeze", "lm": "train"}, "steps": 2, "lr": 1e-3, "batch_size": 2}
    train(recipe(data, stages=[first, second]), console=Console(file=io.StringIO()))
    told = json.loads((data / "run" / "b" / "proof.json").read_text())
    assert told["verdict"] == "proved"
    again = train(recipe(data, stages=[first, second]), resume=True, console=Console(file=io.StringIO()))
    assert again is not None


@pytest.mark.parametrize(("kinds", "verdict"), [([1, 0, 0, 1], "proved"), ([1, 0, 0, 0], "open")])
def test_a_gradient_of_the_warm_up_alone_asks_for_no_change(data, tmp_path, kinds, verdict):
    """The first step has a learning rate of 0 and the only picture; the steps after it leave the connector alone."""
    from test_distributed import samples

    vlm = tiny_vlm(tmp_path)
    stage = Stage(name="s", plan="instruct", steps=4, batch_size=1, lr=1e-3, log_every=1)
    run = StageRun(*(vlm.model, renderer(vlm), stage, samples(tmp_path, kinds), tmp_path / "run", None),
                   Console(file=io.StringIO()))  # fmt: skip
    run.fit()
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert told["verdict"] == verdict and told["first"] == (4 if verdict == "proved" else None)
    why = {"it had gradients only while the learning rate was 0"}
    assert set(told["open"].values()) == (why if verdict == "open" else set())


@pytest.mark.parametrize("when", [0, 3])
def test_a_frozen_tensor_that_moves_is_caught(data, tmp_path, when):
    """One bit of one number, at once or late."""
    vlm = tiny_vlm(tmp_path)
    run = stage_run(vlm, data, tmp_path / "run", warmup_ratio=0)
    update = run.update

    def sabotaged(step, tally):
        if step == when:
            weight = vlm.model.encoders["image"].blocks[0].mlp.fc1.weight.data.view(torch.int32)
            weight[3, 5] += 1
        return update(step, tally)

    run.update = sabotaged
    place = "1" if when == 0 else "4"
    with pytest.raises(ProofError, match=rf"step {place}: 1 of .*frozen tensors changed .*blocks.0.mlp.fc1.weight"):
        run.fit()


def test_an_optimizer_that_forgets_a_part_is_caught(data, tmp_path):
    run = stage_run(tiny_vlm(tmp_path), data, tmp_path / "run", warmup_ratio=0)
    update = run.update

    def sabotaged(step, tally):
        lost = {id(p) for p in run.model.connectors.parameters()}
        for group in run.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in lost]
        return update(step, tally)

    run.update = sabotaged
    with pytest.raises(ProofError, match=r"4 of .*had a gradient but did not change \(connectors.image"):
        run.fit()


def test_statistics_of_a_frozen_part_count(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.BatchNorm1d(4), "b": torch.nn.Linear(4, 4)})
    trained = {n: p for n, p in model.named_parameters() if n.startswith("b")}
    assert set(frozen_tensors(model, trained)) == {
        *("a.weight", "a.bias", "a.running_mean", "a.running_var", "a.num_batches_tracked")
    }
    proof = Proof("s", model, trained, epoch=1)
    model["b"](model["a"](torch.randn(8, 4))).square().sum().backward()
    proof.gradients()
    with pytest.raises(ProofError, match="statistics of a norm layer"):
        proof.stepped(1, 1.0)


# ---------------------------------------------------------------------------------------------------------------- masks


class Sabotaged:
    """A renderer whose samples are changed before they are put in a batch."""

    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def sample(self, example):
        sample = self.inner.sample(example)
        self.change(sample)
        return sample


def everything(sample):
    sample.loss_mask[:] = True


def question(sample):
    first = int(sample.loss_mask.nonzero()[0])
    sample.loss_mask[first - 14 : first] = True


def no_end(sample):
    last = int(sample.loss_mask.nonzero()[-1])
    sample.loss_mask[last] = False


def half_an_answer(sample):
    first = int(sample.loss_mask.nonzero()[0])
    sample.loss_mask[first : first + 2] = False


def shifted(sample):
    sample.loss_mask = sample.loss_mask.roll(-1)


@pytest.mark.parametrize("change", [everything, question, no_end, half_an_answer, shifted])
@pytest.mark.parametrize("pack", [False, True])
def test_a_wrong_mask_is_caught_before_the_first_step(data, tmp_path, change, pack):
    vlm = tiny_vlm(tmp_path)
    run = stage_run(vlm, data, tmp_path / "run", pack=pack)
    before = marks(dict(vlm.model.named_parameters()))
    run.renderer = Sabotaged(run.renderer, change)
    with pytest.raises(ProofError, match=r"sample 'p\d'.*learned.*chiasm inspect"):
        run.fit()
    assert marks(dict(vlm.model.named_parameters())) == before


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_right_masks_pass_whatever_the_template(data, tmp_path, cut):
    """Every template whose control tokens the tokenizer has, padded and packed, whole and cut."""
    from chiasm.processing import templates

    vlm = tiny_vlm(tmp_path)
    mixture = Mixture({"colors": Entry(source=source(data))}, 0)
    tried = set()
    for name in sorted(templates.TEMPLATES):
        made = _with_template(vlm, name)
        examples = [mixture[0, i] for i in ((0, 1, 5) if "plain" in name else (0, 3, 5))]
        for pack in (False, True) if made else ():
            sizes = [len(renderer(made).sample(e)) for e in examples]
            length = min(sizes) - cut if cut else None
            r = renderer(made, max_length=length, pack=pack)
            short = [e for e, size in zip(examples, sizes) if not cut or size == min(sizes)]
            batch = r.batch(short)
            assert check_masks(r.processor, batch, {e.id: e for e in short}, length) == len(short), name
            batch.loss_mask[batch.segment_ids > 0] = True
            with pytest.raises(ProofError):
                check_masks(r.processor, batch, {e.id: e for e in short}, length)
            tried.add(name)
    assert len(tried) >= 3


def _with_template(vlm, name):
    from types import SimpleNamespace

    from chiasm.errors import ChiasmError

    processor = vlm.processor
    try:
        config = type(processor.config).parse(processor.config.dump() | {"template": name})
        made = type(processor)(config, processor.tokenizer, processor.counter)
        made.check()
    except ChiasmError:
        return None
    return None if getattr(made.template.config, "loss", "") == "all" else SimpleNamespace(processor=made)


# ------------------------------------------------------------------------------------------------------------ no number


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("lm.layers.1.mlp.up_proj", r"first bad module: lm.layers.1.mlp.up_proj \(Linear\): its inputs are finite"),
        ("connectors.image.layers.2", r"first bad module: connectors.image.layers.2 \(Linear\)"),
        ("encoders.image.blocks.1.mlp.fc2", r"first bad module: encoders.image.blocks.1.mlp.fc2 \(Linear\)"),
    ],
)
def test_the_first_bad_module_is_named(data, tmp_path, place, told):
    vlm = tiny_vlm(tmp_path)
    run = stage_run(vlm, data, tmp_path / "run")
    update = run.update

    def sabotaged(step, tally):
        if step == 2:
            vlm.model.get_submodule(place).weight.data[0, 0] = float("nan")
        return update(step, tally)

    run.update = sabotaged
    with pytest.raises(NotFinite, match=rf"step 4: the loss is nan; samples: p\d.*{told}.*weight holds 1 of \d+"):
        run.fit()


@pytest.mark.parametrize("when", [0, 3])
def test_a_nan_that_the_attention_kernel_hides_is_caught(data, tmp_path, when):
    """On the CPU ``scaled_dot_product_attention`` gives 0 where the scores are NaN, so the loss stays finite."""
    vlm = tiny_vlm(tmp_path)
    run = stage_run(vlm, data, tmp_path / "run")
    update = run.update

    def sabotaged(step, tally):
        if step == when:
            vlm.model.encoders["image"].blocks[0].attn.q.weight.data[0, 0] = float("nan")
        return update(step, tally)

    run.update = sabotaged
    with pytest.raises(
        ProofError, match=rf"step {when + 1}: 1 of .*not finite \(encoders.image.blocks.0.attn.q.weight; 1 of"
    ):
        run.fit()


def test_an_overflow_on_the_way_is_named_by_its_module(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    layer = vlm.model.lm.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda m, i, output: output * float("inf"))
    with pytest.raises(
        NotFinite, match=r"first bad module: lm.layers.0.mlp.down_proj \(Linear\): its inputs are finite"
    ):
        stage_run(vlm, data, tmp_path / "run").fit()


def test_a_gradient_that_is_no_number_is_traced_back(data, tmp_path):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    vlm = tiny_vlm(tmp_path)
    vlm.model.lm.layers[0].register_forward_hook(lambda m, i, output: Bad.apply(output))
    with pytest.raises(
        NotFinite, match=r"step 1: the gradient norm is nan; samples: .*finite; first bad gradient: at the"
    ):
        stage_run(vlm, data, tmp_path / "run").fit()


# ---------------------------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1025,), (2048, 2)])
def test_a_mark_shows_every_change(dtype, shape):
    x = (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
    before = marks({"x": x})
    assert marks({"x": x.clone()}) == before
    for place in {0, x.numel() // 2, x.numel() - 1}:
        y = x.clone().reshape(-1)
        y[place] = 1 - y[place].float()
        assert marks({"x": y.reshape(shape)}) != before
    if x.numel() > 1:
        swapped = x.reshape(-1).clone()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert marks({"x": swapped}) != before


def test_parts_know_their_media(tmp_path):
    model = tiny_vlm(tmp_path).model
    assert kinds_of(model, "connectors.image.layers.0.weight") == {"image"}
    assert kinds_of(model, "encoders.image.cls") == {"image"}
    assert kinds_of(model, "lm.norm.weight") == set()
    assert kinds_of(model, "newline") is None
    assert kinds_of(torch.nn.Linear(2, 2), "weight") == set()
    assert never_run(model) == []


def test_nothing_stays_on_the_model(data, tmp_path):
    vlm = tiny_vlm(tmp_path)
    stage_run(vlm, data, tmp_path / "run").fit()
    assert all(not m._forward_hooks for m in vlm.model.modules())
    run = stage_run(vlm, data, tmp_path / "again")
    for _, batch in load(run.batches, run.renderer, 0, 1):
        assert isinstance(batch, Batch)
