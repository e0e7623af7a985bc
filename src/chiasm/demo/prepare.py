"""How the demo's shipped parts are made: the tokenizer, and the copying of a trained part into the package.

python -m chiasm.demo.prepare tokenizer src/chiasm/weights/tiny-lm
chiasm train recipes/tiny-lm.yaml
python -m chiasm.demo.prepare ship lm runs/tiny-lm/model src/chiasm/weights/tiny-lm
chiasm train recipes/tiny-tower.yaml
chiasm train recipes/tiny-clip.yaml
python -m chiasm.demo.prepare ship all runs/tiny-clip/model src/chiasm/weights/tiny-tower
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from chiasm.convert.io import open_weights, write_weights
from chiasm.data.sources.playground import LABEL_TASKS, TASKS, PlaygroundText
from chiasm.errors import CheckpointError
from chiasm.vlm import load

CONTROLS = ("<pad>", "<s>", "<|end|>", "<unk>", "<image>", "<video>", "<|user|>", "<|assistant|>")
VOCAB = 1024  # at most; the playground's words need fewer


def texts(examples: int) -> Iterator[str]:
    """Questions, answers and descriptions of the training split."""
    told = tuple(task for task in TASKS if task not in LABEL_TASKS)
    source = PlaygroundText(PlaygroundText.Config(tasks=told, length=examples, turns=6, shorthand=0.5))
    for index in range(examples):
        for message in source[index].messages:
            yield message.text


def make_tokenizer(folder: Path, examples: int = 12_000) -> None:
    """Train a byte-fallback BPE tokenizer on the playground's words; one token for nearly every word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words = [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    spaces = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    tokenizer.decoder = decoders.Sequence(spaces)
    first = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts(examples), trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=first, show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    body = json.loads(tokenizer.to_str())
    # The trainer lists the byte tokens as special, but they stand for ordinary characters of a text.
    body["added_tokens"] = [token for token in body["added_tokens"] if token["content"] in CONTROLS]
    (folder / "tokenizer.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {**named, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def ship(part: str, model: Path, folder: Path) -> int:
    """Write the tensors of one part of a saved model in half precision, under the part's own names; gives the bytes.

    ``"all"`` writes the whole model, as a folder that ``chiasm.load`` opens.
    """
    if part == "all":
        load(model, dtype=torch.float16).save(folder)
        return sum(path.stat().st_size for path in folder.iterdir())
    weights = open_weights(model)
    tensors = {n.removeprefix(part + "."): weights.read(n) for n in weights.info if n.startswith(part + ".")}
    if not tensors:
        raise CheckpointError(f"{model} has no tensor of a part {part!r}; name a part such as 'lm' or 'encoders.image'")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {name: tensor.to(torch.float16) for name, tensor in tensors.items()})
    return sum(path.stat().st_size for path in folder.iterdir())


@click.group(help=__doc__)
def main() -> None:
    """The two commands."""


@main.command("tokenizer")
@click.argument("folder", type=click.Path(path_type=Path))
def _tokenizer(folder: Path) -> None:
    """Train the tokenizer into FOLDER."""
    make_tokenizer(folder)
    click.echo(f"tokenizer in {folder}")


@main.command("ship")
@click.argument("part")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def _ship(part: str, model: Path, folder: Path) -> None:
    """Copy PART of the saved MODEL, or "all" of it, into FOLDER."""
    click.echo(f"{part} in {folder}: {ship(part, model, folder):,} bytes")


if __name__ == "__main__":
    main()
