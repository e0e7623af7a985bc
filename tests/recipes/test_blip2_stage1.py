"""BLIP-2's first stage in the loop: several ranks take the step of one, hard negatives included; resume; its heirs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from rich.console import Console
from test_distributed import Kept, apart, samples, stage
from tiny_run import CHARACTERS, renderer, tokenizer_folder

from chiasm.errors import ConfigError
from chiasm.train import distributed
from chiasm.train.distributed import ALONE
from chiasm.train.loop import Around
from chiasm.vlm import VLM, build

QUIET = Console(file=io.StringIO())
VOCAB = 5 + len(CHARACTERS)
ALL = [1] * 11  # eleven samples with one picture each: the last step is cut short


def config() -> dict[str, Any]:
    vit = {"type": "vit", "image_size": 16, "patch": 8, "dim": 32, "depth": 2, "heads": 2, "mlp": 64}
    qformer = {"type": "qformer", "queries": 4, "dim": 32, "depth": 2, "heads": 2, "mlp": 48, "project": False}
    return {
        "model": {
            "type": "query_text",
            "encoders": {"image": vit},
            "connectors": {"image": qformer | {"text": {"vocab": VOCAB + 1, "positions": 40}}},
            "dim": 16,
            "start": VOCAB,
        },
        "processing": {
            "template": {"type": "turns", "user_text": False, "media_suffix": "", "answer": {"end": "{eos}"}},
            "media": {"image": {"type": "image", "size": 16, "fit": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}},
            "add_bos": True,
        },
    }


def first_stage(folder: Path, seed: int = 0) -> VLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vlm = build(config(), tokenizer=tokenizer_folder(folder / "tokenizer"))
        for p in vlm.parameters():
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
    return vlm.eval()


def run(folder: Path, ranks: Any, resume: bool = False, stop_at: int = -1, kinds: list[int] = ALL, **settings: Any):
    own = folder / f"rank{ranks.rank}"
    vlm = first_stage(own)
    settings = {"batch": 4, "accumulate": 1, "objective": "blip2_stage1", "max_length": 40} | settings
    done = Kept(
        *(vlm.model, renderer(vlm, max_length=40), stage(**settings), samples(own, kinds), folder / "run"),
        console=QUIET,
        around=Around(ranks=ranks),
    )
    done.stop_at = stop_at
    try:
        done.fit(resume)
    except KeyboardInterrupt:
        return None
    return {"gradients": done.kept, "weights": {n: w.clone() for n, w in vlm.model.state_dict().items()}}


CUTS = [(4, 1), (1, 4), (2, 2), (3, 1)]  # batch_size, accumulate: shares are equal, whole, crosswise, unequal


def in_every_cut(folder: Path) -> dict[Any, Any]:
    with distributed.started("cpu", patience=150) as ranks:
        return {
            (plan, cut): run(folder / f"{plan}{cut}", ranks, batch=cut[0], accumulate=cut[1], steps=3, plan=plan)
            for plan in ("end_to_end", "instruct")
            for cut in (CUTS if plan == "end_to_end" else CUTS[-1:])
        }


def test_two_ranks_take_the_step_of_one(tmp_path: Path):
    """Every sample is compared with all others of the step and may be drawn as a negative, wherever it is."""
    both, alone = launch(2, in_every_cut, tmp_path / "two"), launch(1, in_every_cut, tmp_path / "one")[0]
    for key, expected in alone.items():
        assert len(expected["gradients"]) == 3
        for result in both:
            for got, wanted in zip(result[key]["gradients"], expected["gradients"], strict=True):
                assert apart(got, wanted) <= 2e-6, key
            assert apart(result[key]["weights"], both[0][key]["weights"]) == 0
    for cut in CUTS[:3]:  # however a step of four is cut, it is one step
        for got, wanted in zip(
            alone["end_to_end", cut]["gradients"], alone["end_to_end", (4, 1)]["gradients"], strict=True
        ):
            assert apart(got, wanted) <= 2e-6, cut


def one_rank_has_nothing(folder: Path) -> Any:
    with distributed.started("cpu", patience=150) as ranks:
        return run(folder / "few", ranks, batch=2, steps=2, kinds=[1, 1, 1])  # the second step has one sample


def test_a_rank_without_a_sample(tmp_path: Path):
    (first, second), alone = (
        launch(2, one_rank_has_nothing, tmp_path / "2"),
        launch(1, one_rank_has_nothing, tmp_path / "1"),
    )
    for result in (first, second):
        for got, wanted in zip(result["gradients"], alone[0]["gradients"], strict=True):
            assert apart(got, wanted) <= 2e-6


def in_pieces(folder: Path) -> str:
    with distributed.started("cpu", "shard", patience=150) as ranks:
        with pytest.raises(ConfigError) as told:
            run(folder, ranks)
        return str(told.value)


def test_a_model_in_pieces_is_refused(tmp_path: Path):
    assert all("set parallel: replicate" in told for told in launch(2, in_pieces, tmp_path))


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path):
    whole = run(tmp_path / "whole", ALONE, save_every=2)
    run(tmp_path / "cut", ALONE, save_every=2, stop_at=3)
    again = run(tmp_path / "cut", ALONE, save_every=2, resume=True)
    assert len(again["gradients"]) == 4
    assert apart(again["weights"], whole["weights"]) == 0


def test_the_losses_are_told_one_by_one(tmp_path: Path):
    import json

    run(tmp_path, ALONE, steps=3)
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    named = ("contrast", "matching", "writing")
    assert line["loss"] == pytest.approx(sum(line[name] for name in named), rel=1e-5)
    assert 0 <= line["matching_accuracy"] <= 1 and line["temperature"] > 0
    proof = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert proof["verdict"] == "proved" and not proof["unused"]
