"""A modality and a connector from outside the package: composed by configuration, trained, saved, loaded."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F

from chiasm import registry
from chiasm.compose import build_model, check_counts
from chiasm.errors import DataError, RegistryError
from chiasm.fusion.base import Fusion
from chiasm.lm.tokenizer import Tokenizer
from chiasm.processing.processor import ProcessingConfig, Processor
from plugins import toy_modality
from plugins.toy_modality import Toy

MODEL = {
    "type": "splice",
    "encoders": {"toy": {"type": "toy", "width": 8}},
    "connectors": {"toy": {"type": "toy"}},
    "lm": {
        "type": "decoder",
        "vocab": 300,
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "mlp": 24,
        "max_positions": 64,
    },
    "media": {"toy": {"encoders": ["toy"], "connector": "toy"}},
}
PROCESSING = {
    "template": {
        "type": "turns",
        "user_turn": {"prefix": "Q: "},
        "answer": {"prompt": " A:", "lead": " ", "end": "</s>"},
    },
    "media": {"toy": {"type": "toy", "divide_by": 2.0}},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with the control tokens that the template and the front end name."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "</s>", "<toy>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["Q: is the sum large? A: up", "Q: is the sum large? A: down"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return Tokenizer.from_folder(folder)


def parts(tokenizer: Tokenizer) -> tuple[Fusion, Processor]:
    config = registry.get("fusion", "splice").Config.parse(MODEL)
    torch.manual_seed(0)
    model = build_model(config)
    return model, Processor(ProcessingConfig.parse(PROCESSING), tokenizer, config.count)


def conversation(numbers: list[float], answer: bool = True) -> list[dict[str, Any]]:
    """The answer depends on the numbers and on nothing else."""
    question = [{"type": "toy", "toy": numbers}, {"type": "text", "text": "is the sum large?"}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer:
        turns.append({"role": "assistant", "content": "up" if sum(numbers) > 0 else "down"})
    return turns


def drawn(count: int, seed: int) -> list[list[float]]:
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    values = values[values.sum(1).abs() > 0.5]
    return values.tolist()


def train(model: Fusion, processor: Processor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = processor.batch([conversation(n) for n in drawn(24, step)], train=True)
        output = model(batch, logits="labels")
        loss = F.cross_entropy(output.logits, output.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def first_words(model: Fusion, processor: Processor, numbers: list[list[float]]) -> list[str]:
    batch = processor.batch([conversation(n, answer=False) for n in numbers], add_generation_prompt=True)
    with torch.no_grad():
        logits = model(batch, logits="last").logits
    return [processor.decode([i]).strip() for i in logits.argmax(1).tolist()]


def test_the_counts_are_kept(tokenizer: Tokenizer):
    model, processor = parts(tokenizer)
    check_counts(model.config, {"toy": (4,)})
    sample = processor(conversation([1.0, 2.0, 3.0, 4.0]), id="a", train=True)
    assert [len(item.slots) for item in sample.media] == [3]  # four numbers and their sum, in pairs
    assert torch.equal(sample.media[0].inputs, torch.tensor([[0.5, 1.0, 1.5, 2.0]]))
    assert pickle.loads(pickle.dumps(processor)).counter("toy", sample.media[0].layout) == 3


def test_objects_and_tables_are_the_same_message(tokenizer: Tokenizer):
    _, processor = parts(tokenizer)
    table = conversation([1.0, 2.0])
    objects = [{"role": "user", "content": [Toy([1.0, 2.0]), "is the sum large?"]}, table[1]]
    assert torch.equal(processor(table).input_ids, processor(objects).input_ids)


def test_errors_name_the_sample(tokenizer: Tokenizer):
    _, processor = parts(tokenizer)
    with pytest.raises(DataError, match="sample 'empty', medium 1 of 1: a toy of no numbers"):
        processor(conversation([]), id="empty")


def test_trains_saves_and_loads(tokenizer: Tokenizer, tmp_path: Path):
    model, processor = parts(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, processor, steps=60)
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5]), losses
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"

    unseen = drawn(60, 1000)
    expected = ["up" if sum(n) > 0 else "down" for n in unseen]
    answers = first_words(model, processor, unseen)
    hits = sum(e.startswith(a) and a != "" for a, e in zip(answers, expected, strict=True))
    assert len(set(expected)) == 2 and hits / len(unseen) > 0.9, (answers, expected)

    (tmp_path / "config.json").write_text(
        json.dumps({"model": model.config.dump(), "processing": processor.config.dump()})
    )
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tokenizer.save(tmp_path)

    saved = json.loads((tmp_path / "config.json").read_text())
    again = build_model(registry.get("fusion", saved["model"]["type"]).Config.parse(saved["model"]))
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    renewed = Processor(
        ProcessingConfig.parse(saved["processing"]), Tokenizer.from_folder(tmp_path), again.config.count
    )
    batch = processor.batch([conversation(n) for n in unseen[:3]])
    other = renewed.batch([conversation(n) for n in unseen[:3]])
    assert torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.loss_mask, other.loss_mask)
    with torch.no_grad():
        assert torch.equal(model(batch, logits="all").logits, again(other, logits="all").logits)


def test_packed_is_padded(tokenizer: Tokenizer):
    model, processor = parts(tokenizer)
    conversations = [conversation(n) for n in ([0.1, 0.2], [3.0, -4.0], [-1.0, 2.0])]
    padded = model(processor.batch(conversations, train=True), logits="labels")
    packed = model(processor.batch(conversations, train=True, pack=True), logits="labels")
    losses = [F.cross_entropy(o.logits, o.targets, reduction="sum") for o in (padded, packed)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)


def test_a_part_by_its_place_needs_no_registration():
    """``package.module:Class`` finds a part in a fresh process that never imported it."""
    code = (
        "from chiasm import registry\n"
        "entry = registry.get('connector', 'plugins.toy_modality:ToyConnector')\n"
        "print(entry.__name__)"
    )
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tests)
    assert done.stdout.strip() == "ToyConnector"


def test_a_taken_name_is_refused():
    with pytest.raises(RegistryError, match="'mlp' is registered already"):
        registry.register("connector", "mlp")(toy_modality.ToyConnector)


def test_the_package_does_not_know_the_toy():
    import chiasm

    for path in Path(chiasm.__file__).parent.rglob("*.py"):
        assert '"toy"' not in path.read_text(encoding="utf-8"), path
