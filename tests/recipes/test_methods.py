"""Methods: what they train, what they leave alone, saving, merging, packing, generation, and files of ``peft``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import model_config, renderer, source, tiny_vlm, tokenizer_folder, write_mixed, write_pictures

from chiasm.compose import installed
from chiasm.data.mixture import Entry, Mixture
from chiasm.errors import CheckpointError, ChiasmError, ConfigError
from chiasm.infer.engine import generate
from chiasm.train.loop import StageRun
from chiasm.train.methods.base import own_parameters
from chiasm.train.methods.files import load_adapter, save_adapter
from chiasm.train.methods.merge import distance, merge, probe_logits
from chiasm.train.methods.nf4 import LEVELS, dequantise, quantise
from chiasm.train.methods.settle import settle
from chiasm.train.methods.table import parse_method
from chiasm.train.objectives.next_token import next_token
from chiasm.train.plan import apply, prepare, resolve
from chiasm.train.recipe import Stage
from chiasm.vlm import build, load

METHODS = {
    "lora": "lora(r=2, alpha=4)",
    "qlora": "qlora(r=2, alpha=4)",
    "qlora, single": "qlora(r=2, alpha=4, double=false)",
    "adapter": "adapter(bottleneck=4)",
    "prefix": "prefix(tokens=3)",
    "prompt": "prompt(tokens=3)",
}
EVERYWHERE = {"*": "freeze", "encoders": "lora(r=2)", "connectors": "train", "lm": "qlora(r=2)"}


def with_method(vlm, table, seed: int = 1):
    """The model with the table's methods, whose parameters are random and not small."""
    table = {"*": "freeze"} | table
    prepare(vlm.model, table)
    apply(vlm.model, resolve(vlm.model, table, 1e-3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own = own_parameters(vlm.model)
        for name, p in vlm.named_parameters():
            if name in own:
                p.copy_((0.1 if ".lora_" in name else 0.3) * torch.randn(p.shape, generator=generator))
    vlm.model.eval()
    return vlm


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("part", ["lm", "encoders.image"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_its_share(tmp_path: Path, name: str, part: str):
    vlm = tiny_vlm(tmp_path)
    before = {n: p.clone() for n, p in vlm.named_parameters()}
    vlm = with_method(vlm, {part: METHODS[name]})
    mixture = write_mixed(tmp_path)
    batch = renderer(vlm).batch([mixture[0, i] for i in range(4)])
    loss = next_token(vlm.model, batch)
    loss.total.backward()
    own = own_parameters(vlm.model)
    assert own and all(n.startswith(part) for n in own)
    for n, p in vlm.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (n in own), n
        assert n in own or torch.equal(p, before[n]), n
    plan = resolve(vlm.model, {"*": "freeze", part: METHODS[name]}, 1e-3)
    assert plan.trainable == sum(vlm.model.get_parameter(n).numel() for n in own)
    assert plan.total == sum(p.numel() for p in before.values()) + plan.trainable


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("part", ["lm", "encoders.image"])
def test_save_load_packed_padded_cached(tmp_path: Path, name: str, part: str):
    vlm = tiny_vlm(tmp_path)
    plain = probe_logits(vlm)
    vlm = with_method(vlm, {part: METHODS[name]})
    changed = probe_logits(vlm)
    assert apart(plain, changed) > 1e-3
    vlm.save(tmp_path / "saved")
    assert apart(changed, probe_logits(load(tmp_path / "saved"))) == 0

    mixture = write_mixed(tmp_path)
    examples = [mixture[0, i] for i in range(4)]
    losses = [next_token(vlm.model, renderer(vlm, pack=pack).batch(examples)) for pack in (False, True)]
    alone = [next_token(vlm.model, renderer(vlm).batch([example])) for example in examples]
    assert losses[0].weight == losses[1].weight == sum(loss.weight for loss in alone)
    for loss in losses:
        assert loss.total.item() == pytest.approx(sum(a.total.item() for a in alone), rel=1e-5)

    talks = [[{"role": "user", "content": text}] for text in ("Hi.", "A much longer question, is it?")]
    several = generate(vlm.model, vlm.processor, talks, max_new_tokens=8, return_details=True)
    for talk, answer in zip(talks, several, strict=True):
        fresh = generate(vlm.model, vlm.processor, talk, max_new_tokens=8, use_cache=False, return_details=True)
        assert answer.ids == fresh.ids
    assert sum(len(answer.ids) for answer in several) > 4


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_begins_as_it_was(tmp_path: Path, name: str):
    vlm = tiny_vlm(tmp_path)
    before = probe_logits(vlm)
    prepare(vlm.model, {"*": "freeze", "lm": METHODS[name], "encoders": METHODS[name]})
    assert apart(before, probe_logits(vlm)) == 0


def test_nothing_is_put_where_nothing_runs(tmp_path: Path):
    """Blocks behind the layer that is read get no gradient, so no method either."""
    for action, count in (("lora", 6), ("adapter", 2), ("prefix", 1)):
        config = model_config()
        config["model"]["encoders"]["image"] |= {"layer": -2, "post_norm": "unused"}
        vlm = build(config, tokenizer=tokenizer_folder(tmp_path / "t"))
        prepare(vlm.model, {"*": "freeze", "encoders": action})
        changed = [name for _, names in installed(vlm.model) for name in names]
        assert len(changed) == count and all(".blocks.0." in name for name in changed)


def test_prefix_against_formula(tmp_path: Path):
    """One attention of the language model against the sum over all columns, written out."""
    vlm = with_method(tiny_vlm(tmp_path), {"lm": "prefix(tokens=3)"})
    attention = vlm.model.lm.layers[0].attn
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    still = (torch.ones(1, 1, 5, 16), torch.zeros(1, 1, 5, 16))  # no rotation
    from chiasm.nn.masks import Attend

    found = attention(x, still, Attend(causal=True), None, 0)
    q = attention.q_proj(x).view(5, 2, 16)
    k = torch.cat((attention.prefix_keys[0], attention.k_proj(x)[0]))  # one key head
    v = torch.cat((attention.prefix_values[0], attention.v_proj(x)[0]))
    for t in range(5):
        heads = [torch.softmax(k[: 3 + t + 1] @ q[t, h] / 4, 0) @ v[: 3 + t + 1] for h in range(2)]
        assert torch.allclose(found[0, t], attention.o_proj(torch.cat(heads)), atol=1e-6)


def test_prompt_is_text_in_front(tmp_path: Path):
    """A prompt made of embeddings gives what the same tokens give in front of the text."""
    vlm = tiny_vlm(tmp_path)
    lm, ids = vlm.model.lm, torch.tensor([[7, 8, 9, 20, 21, 22, 23]])
    positions, ones = torch.arange(7).unsqueeze(0), torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        whole = lm(lm.embed(ids), positions, ones)[:, 3:]
        with_method(vlm, {"lm": "prompt(tokens=3)"})
        lm.prompt.tokens.copy_(lm.embed(ids[0, :3]))
        found = lm(lm.embed(ids[:, 3:]), positions[:, :4], ones[:, :4])
    assert torch.allclose(found, whole, atol=1e-6)
    assert lm.max_positions == 256 - 3


def test_nf4_is_the_nearest_level():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    expected = LEVELS[(flat.unsqueeze(-1) / largest.unsqueeze(-1) - LEVELS).abs().argmin(-1)] * largest
    found = dequantise(quantise(weight, False), weight.shape, torch.float32)
    assert torch.equal(found.flatten(), expected.flatten()[: weight.numel()])
    double = dequantise(quantise(weight, True), weight.shape, torch.float32)
    assert 0 < float((double - found).abs().max()) < 0.01 * float(largest.max())
    assert quantise(weight, True).codes.nbytes * 2 >= weight.numel() > quantise(weight, True).codes.nbytes * 1.8
    # the levels of the paper's appendix E, to its printed digits
    printed = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    printed += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert torch.allclose(LEVELS, torch.tensor(printed), atol=5e-9, rtol=1e-7)


def test_qlora_gradient_is_that_of_its_weight(tmp_path: Path):
    vlm = with_method(tiny_vlm(tmp_path), {"lm": "qlora(r=2)"})
    layer = vlm.model.lm.layers[0].mlp.gate_proj
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(one).square().sum().backward()
    layer.merged()(two).square().sum().backward()
    assert distance(two.grad, one.grad) < 1e-6


def test_merge_is_proved(tmp_path: Path):
    vlm = with_method(tiny_vlm(tmp_path), EVERYWHERE)
    before = probe_logits(vlm)
    names = set(tiny_vlm(tmp_path).state_dict())
    proof = merge(vlm)
    assert proof.gap <= 1e-5 and proof.layers == 12 + 14 and proof.positions > 50
    assert apart(before, probe_logits(vlm)) == proof.gap
    assert set(vlm.state_dict()) == names
    vlm.save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["methods"] == []
    assert apart(before, probe_logits(load(tmp_path / "merged"))) <= 1e-5
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(vlm)


def test_a_wrong_merge_is_refused(tmp_path: Path, monkeypatch):
    vlm = with_method(tiny_vlm(tmp_path), {"lm": "lora(r=2)"})
    before = probe_logits(vlm)
    layer = vlm.model.lm.layers[1].attn.v_proj
    rightly = type(layer).merged

    def wrongly(self):
        plain = rightly(self)
        with torch.no_grad():
            plain.weight.mul_(1.001)
        return plain

    monkeypatch.setattr(type(layer), "merged", wrongly)
    with pytest.raises(CheckpointError, match="nothing was merged"):
        merge(vlm)
    assert vlm.model.dtype == torch.float32 and apart(before, probe_logits(vlm)) == 0
    assert vlm.model.lm.layers[1].attn.v_proj is layer
    with pytest.raises(ConfigError, match="float32"):
        merge(with_method(tiny_vlm(tmp_path), {"lm": "lora"}).to(torch.bfloat16))


@pytest.mark.parametrize("name", METHODS)
def test_adapter_folder(tmp_path: Path, name: str):
    vlm = tiny_vlm(tmp_path)
    vlm.save(tmp_path / "base")
    vlm = with_method(vlm, {"lm": METHODS[name], "connectors": "train"})
    with torch.no_grad():
        for p in vlm.model.connectors.parameters():
            p.mul_(1.5)
    save_adapter(vlm, tmp_path / "adapter", tmp_path / "base")
    for loaded in (load(tmp_path / "adapter"), load_adapter(tmp_path / "adapter", tmp_path / "base")):
        assert apart(probe_logits(vlm), probe_logits(loaded)) == 0
    size = sum(f.stat().st_size for f in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError, match="mark"):
        load_adapter(tmp_path / "adapter", tiny_vlm(tmp_path / "other", seed=5))
    with pytest.raises(CheckpointError, match="carries"):
        load_adapter(tmp_path / "adapter", vlm)


def test_damaged_adapter(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    vlm = tiny_vlm(tmp_path)
    vlm.save(tmp_path / "base")
    save_adapter(with_method(vlm, {"lm": "lora(r=2)"}), tmp_path / "a", tmp_path / "base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(iter(whole))
    for changed, words in (
        ({n: t for n, t in whole.items() if "layers.1" not in n}, "missing"),
        (whole | {first: torch.zeros(3, 3)}, "in the file"),
        (whole | {first: whole[first] * float("nan")}, "NaN"),
        ({n: t for n, t in whole.items() if n != first}, "one of two"),
    ):
        save_file({n: t.clone() for n, t in changed.items()}, file)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "a")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("lora(r=2, alhpa=3)", "alpha"),
        ("lroa(r=2)", "lora"),
        ("lora(r=0)", "greater than 0"),
        ("lora(r)", "key=value"),
        ("lora(r=2, r=3)", "twice"),
        ("lora(targets=[q_porj])", "q_proj"),
        ({"r": 3}, "type"),
        ({"type": "lora", "ranks": 3}, "ranks"),
        ("prefix(tokens=2)", "0 attentions"),
        ("prompt", "no language model"),
        ("adapter(targets=[mpl])", "matches 0"),
    ],
)
def test_bad_actions(tmp_path: Path, action, words: str):
    part = "connectors" if "prefix" in str(action) or "prompt" in str(action) else "lm"
    with pytest.raises(ChiasmError, match=words):
        resolve(tiny_vlm(tmp_path).model, {"*": "train", part: action}, 1e-3)


def test_written_forms_are_one():
    text = parse_method("lora(r=4, alpha=8, dropout=0.05, targets=[q_proj, v_proj], lr=1e-4)")
    table = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.05, "targets": ["q_proj", "v_proj"], "lr": 1e-4}
    assert text == parse_method(table) and parse_method(text.label()) == text.model_copy(update={"lr": None})
    assert parse_method("freeze") is None


def test_a_stage_writes_the_adapter_and_resumes(tmp_path: Path):
    """Stopped and resumed, a LoRA stage ends at the same bits; the base is not moved."""
    write_pictures(tmp_path)
    plan = {"*": "freeze", "connectors": "train", "lm": "lora(r=2, dropout=0.1)"}
    ends = []
    for stop in (None, 3):
        vlm = tiny_vlm(tmp_path)
        base = {n: t.clone() for n, t in vlm.state_dict().items()}
        out = tmp_path / f"run{stop}"
        for resume in (False, True) if stop else (False,):
            if resume:
                vlm = tiny_vlm(tmp_path)
            settings = {"plan": plan, "steps": 6, "batch_size": 3, "lr": 1e-2, "save_every": 3, "log_every": 1}
            mixture = Mixture({"colors": Entry(source=source(tmp_path))}, 0)
            quiet = Console(file=io.StringIO())
            run = StageRun(vlm.model, renderer(vlm), Stage(name="s", **settings), mixture, out, None, quiet)
            if stop and not resume:
                update = run.update

                def halt(step, tally, update=update, stop=stop):
                    if step == stop:
                        raise KeyboardInterrupt
                    return update(step, tally)

                run.update = halt
                with pytest.raises(KeyboardInterrupt):
                    run.fit()
            else:
                run.fit(resume)
        ends.append({n: p.detach().clone() for n, p in vlm.named_parameters()})
        moved = {n for n, t in base.items() if not torch.equal(t, vlm.state_dict()[n])}
        assert moved == {n for n in base if n.startswith("connectors.")}
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_stage_ends_whole(tmp_path: Path, name: str):
    """A stage in bfloat16: 4-bit codes untouched, base weights back to the bit, merged with the proof."""
    write_pictures(tmp_path)
    vlm = tiny_vlm(tmp_path)
    before = {n: t.clone() for n, t in vlm.state_dict().items()}
    plan = {"*": "freeze", "lm": METHODS[name]}
    stage = Stage(name="s", plan=plan, steps=4, batch_size=4, lr=1e-2, dtype="bf16", log_every=1)
    mixture = Mixture({"colors": Entry(source=source(tmp_path))}, 0)
    run = StageRun(vlm.model, renderer(vlm), stage, mixture, tmp_path / "out", None, Console(file=io.StringIO()))
    run.fit()
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0]
    kept = vlm.state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in before.items() if n in kept)
    told = settle(vlm, run.plan, tmp_path / "adapter", None)
    assert ("merged" in told) == (name == "lora")
    vlm.save(tmp_path / "model")
    assert apart(probe_logits(vlm), probe_logits(load(tmp_path / "model"))) == 0


@pytest.mark.parametrize("action", ["lora(r=2)", "qlora(r=2)", "adapter(bottleneck=3)", "prompt(tokens=3)"])
def test_language_models_of_transformers(tmp_path: Path, action: str):
    pytest.importorskip("transformers")
    config = model_config()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config["model"]["lm"] = {
        "type": "hf",
        "config": {"model_type": "qwen2", "vocab_size": 96, "num_key_value_heads": 1, "max_position_embeddings": 256}
        | sizes,
    }
    vlm = with_method(build(config, tokenizer=tokenizer_folder(tmp_path / "t")).eval(), {"lm": action})
    changed = probe_logits(vlm)
    vlm.save(tmp_path / "saved")
    assert apart(changed, probe_logits(load(tmp_path / "saved"))) == 0
    mixture = write_mixed(tmp_path)
    examples = [mixture[0, i] for i in range(4)]
    alone = sum(next_token(vlm.model, renderer(vlm).batch([example])).total.item() for example in examples)
    for pack in (False, True):
        together = next_token(vlm.model, renderer(vlm, pack=pack).batch(examples)).total.item()
        assert together == pytest.approx(alone, rel=1e-5)
    talk = [{"role": "user", "content": "Hi."}]
    cached, fresh = (generate(vlm.model, vlm.processor, talk, max_new_tokens=8, use_cache=c) for c in (True, False))
    assert cached == fresh
    if "lora" in action:
        assert merge(vlm).gap <= 1e-5


def test_a_prefix_in_a_tower_read_at_its_class_vector():
    """Its last block computes one position, which looks at the prefix as it would among all."""
    from chiasm.encoders.vit import ViT

    found = []
    for select in ("cls_patch", "cls"):
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch": 8, "dim": 16, "depth": 2, "heads": 2, "mlp": 32}
        tower = ViT(ViT.Config(**sizes, select=select))
        holder = torch.nn.Module()
        holder.tower = tower
        prepare(holder, {"*": "prefix(tokens=3)"})
        torch.manual_seed(1)
        for p in holder.parameters():
            p.data.normal_()
        found.append(tower(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))).x[:, 0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert found[0].abs().mean() > 0.1
