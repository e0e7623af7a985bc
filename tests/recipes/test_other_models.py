"""The same loop on other language models: one of transformers, and an encoder-decoder."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import CHARACTERS, model_config, renderer, tokenizer_folder, write_mixed

from chiasm.train.loop import StageRun
from chiasm.train.recipe import Stage
from chiasm.vlm import build

pytest.importorskip("transformers")
VOCAB = 5 + len(CHARACTERS)
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
T5 = {
    **{"model_type": "t5", "vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    **{"dropout_rate": 0.1, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
}


@pytest.mark.parametrize(("lm", "target"), [(GPT2, "sequence"), (T5, "decoder")], ids=["gpt2", "t5"])
def test_trains(lm, target, tmp_path: Path):
    mixed = write_mixed(tmp_path)
    config = model_config()
    config["model"]["lm"] = {"type": "hf", "config": lm}
    config["processing"]["target"] = target
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vlm = build(config, tokenizer=tokenizer_folder(tmp_path / "tokenizer"))
    stage = Stage(
        name="s", plan="instruct", steps=60, batch_size=2, accumulate=2, lr=5e-3, log_every=60, dtype="float32"
    )
    before = {n: p.detach().clone() for n, p in vlm.named_parameters()}
    run = StageRun(vlm.model, renderer(vlm), stage, mixed, tmp_path / "run", None, Console(file=io.StringIO()))
    batch = renderer(vlm).batch([mixed[0, i] for i in range(4)])
    with torch.no_grad():
        start = run.objective(vlm.model.eval(), batch)
    run.fit()
    with torch.no_grad():
        end = run.objective(vlm.model, batch)
    assert start.weight == end.weight > 0
    assert end.total < 0.5 * start.total
    for name, p in vlm.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("encoders."), name
