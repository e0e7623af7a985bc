"""A model with its processor and configuration: load, build, generate, chat, save, export.

vlm = chiasm.load("runs/mine")                       # our own folder, one of transformers, or an original LLaVA
vlm.generate([{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, "What is this?"]}])
vlm.save("runs/copy"); vlm.export("out", format="hf")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from chiasm import registry
from chiasm.card import card
from chiasm.checkpoints import folder as own
from chiasm.checkpoints.hub import local_folder
from chiasm.checkpoints.parts import load_part
from chiasm.checkpoints.vocabulary import check_vocabulary
from chiasm.compose import SHORT, as_device, as_dtype, build_model, check_counts, install
from chiasm.conversation import Chat
from chiasm.convert.io import read_json, replaced_folder
from chiasm.errors import CheckpointError, ConfigError, nearest
from chiasm.fusion.base import Fusion
from chiasm.infer import embed, rounded, zero_shot
from chiasm.infer.engine import generate, is_conversation
from chiasm.infer.kept import Memory
from chiasm.infer.look import Look, look
from chiasm.infer.rank import By, Ranked, rank
from chiasm.lm.silent import Silent
from chiasm.lm.tokenizer import Tokenizer
from chiasm.model_config import VLMConfig
from chiasm.nn.quality import Nearness, Quality
from chiasm.nn.quant import refuse_quantized
from chiasm.presets.checkpoint import TENSORS, Options, Reader, table_of
from chiasm.processing.pair import reads_nothing
from chiasm.processing.processor import Processor, TokenizerLike


class VLM:
    """A network (``model``), what prepares its input (``processor``) and what both were made from (``config``)."""

    def __init__(self, config: VLMConfig, model: Fusion, processor: Processor | None = None):
        self.config = config if processor is None else config.model_copy(update={"processing": processor.config})
        self.model = model
        self.memory: Memory | None = None
        self._processor = processor

    @property
    def processor(self) -> Processor:
        """Renders conversations. Raises ConfigError where the model has no tokenizer yet."""
        if self._processor is None:
            raise ConfigError(
                "this model has no tokenizer, so it can read no conversation: build it with "
                "chiasm.build(config, tokenizer=folder), or set 'tokenizer' in the configuration"
            )
        return self._processor

    @property
    def tokenizer(self) -> Tokenizer:
        """The processor's tokenizer."""
        return self.processor.tokenizer  # type: ignore[return-value]

    @property
    def has_processor(self) -> bool:
        """Whether there is a tokenizer, and so a processor."""
        return self._processor is not None

    # ---------------------------------------------------------------------------------------------- text

    def generate(self, messages: Sequence[Any], **options: Any) -> Any:
        """The answer to one conversation, or to each of a list of conversations.

        ``options``: ``max_new_tokens``, ``stream`` (an iterator of pieces), ``temperature``, ``top_k``, ``top_p``,
        ``num_beams``, ``repetition_penalty``, ``stop``, ``seed``, ``constraint``, ``return_details``: see
        ``chiasm.infer.engine``.
        """
        if self.model.silent:
            raise ConfigError(self.model.silent)
        return generate(self.model, self.processor, messages, **{"memory": self.memory, **options})

    def remember(self, prefix_bytes: int = 1 << 28, feature_bytes: int = 1 << 27) -> VLM:
        """Calls of ``generate`` use what earlier ones computed, at most so many bytes; 0 and 0: no more, and forget."""
        self.memory = Memory(prefix_bytes, feature_bytes) if prefix_bytes or feature_bytes else None
        return self

    def rank(self, messages: Sequence[Any], candidates: Sequence[str], by: By = "sum", **options: Any) -> list[Ranked]:
        """The candidates as answers to a conversation, the most likely first: see ``chiasm.infer.rank``.

        ``by``: "sum" is the log-probability of the whole answer and its end, "mean" that of its tokens.
        """
        return rank(self.model, self.processor, messages, candidates, by, **options)

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation that remembers what was said. ``options`` are those of ``generate``."""
        return Chat(self, system, options)

    def look(
        self, messages: Sequence[Any], answer: str | None = None, word: int | str | None = None, **options: Any
    ) -> Look:
        """Where the model looks when it writes ``word`` (a number, a text; None: all) of ``answer`` to ``messages``.

        ``answer`` None: it is generated. ``options``: ``method`` ("attention", "gradient"), ``last`` layers: see
        ``chiasm.infer.look``. Raises DataError, ConfigError.
        """
        answer = self.generate(messages) if answer is None else answer
        return look(self.model, self.processor, messages, answer, word, **options)

    # ---------------------------------------------------------------------------------------------- vectors

    def embed(self, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None, **options: Any) -> Tensor:
        """Vectors of unit length ``[n, D]`` of pictures or of texts: models of two towers. See ``chiasm.infer.embed``.

        ``options``: ``batch``, ``workers``, ``truncate`` (texts that are too long lose their end instead of being
        refused). Raises DataError, ConfigError.
        """
        return embed.embed(self.model, self.processor, images, texts, **options)

    def classify(
        self, images: Sequence[Any], labels: Sequence[str] | None = None, templates: Any = None, **options: Any
    ) -> Tensor:
        """Probabilities ``[n, labels]``: of labels in words, without training, by a model of two towers; of its own
        classes (``processing.labels``) by a model that has some. ``templates``: texts with ``{}``, or a set's name.

        ``options``: ``independent``, ``batch``, ``workers``: see ``chiasm.infer.zero_shot``. Raises DataError.
        """
        if labels is None:
            return embed.classes(self.model, self.processor, images, **options)
        return zero_shot.classify(self.model, self.processor, images, labels, templates, **options)

    # ---------------------------------------------------------------------------------------------- parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's parameters."""
        return self.model.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters by name (``encoders.image.*``, ``connectors.image.*``, ``lm.*``, ``newline``)."""
        return self.model.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The network's tensors by name."""
        return self.model.state_dict()

    def num_parameters(self, trainable: bool = False) -> int:
        """How many numbers the network has, or how many of them are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def to(self, *args: Any, **kwargs: Any) -> VLM:
        """Move or cast the network, as ``nn.Module.to``; gives the same object. Types may be names.

        Raises ConfigError where there is no such device or type.
        """
        args = tuple(_place(word) for word in args)
        read: dict[str, Any] = {"device": as_device, "dtype": as_dtype}
        named: dict[str, Any] = {key: read[key](value) if key in read else value for key, value in kwargs.items()}
        self.model.to(*args, **named)
        return self

    def eval(self) -> VLM:
        """Evaluation mode."""
        self.model.eval()
        return self

    def train(self, mode: bool = True) -> VLM:
        """Training mode."""
        self.model.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.model.dtype

    def quantize(self, how: str = "int8", prompts: Sequence[Any] = (), **options: Any) -> Quality | Nearness | None:
        """Turn the language model's weights, or those of two towers, into 8 or 4 bits, in place, for inference only.

        With ``prompts`` (conversations) it tells what that did to the distributions of the next token; ``options``:
        ``images`` and ``texts`` to compare vectors of, ``names``, ``keep``: see ``chiasm.infer.rounded``.
        """
        return rounded.quantize(self.model, self.processor, how, prompts, **options)

    # ---------------------------------------------------------------------------------------------- files

    def load_part(self, part: str, path: str | Path, allow_pickle: bool = False) -> VLM:
        """Read the weights of one part (``"lm"``, ``"encoders.image"``, ``"connectors.image"``) from a folder or file.

        The folder is one of transformers, of this package or, for a connector, of the original LLaVA. Raises
        CheckpointError where its configuration or a tensor does not fit, ConfigError where the folder's tokenizer is
        another than the model's.
        """
        check_vocabulary(part, Path(path), self._processor and self._processor.tokenizer)
        dropped = own.dropped(load_part(self.model, part, path, allow_pickle))
        note = f"weights of {part} read from {path}"
        provenance = self.config.provenance.add(note, *dropped, base={part: str(path)})
        self.config = self.config.model_copy(update={"provenance": provenance})
        return self

    def save(
        self, folder: str | Path, max_shard: int = 5_000_000_000, tensors: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write a folder that ``chiasm.load`` reads: configuration, weights, tokenizer, fingerprint.

        Files are written aside and moved into place when all are whole. ``max_shard`` is in bytes. ``tensors``, by
        name, are written in place of the model's own: training keeps in float32 what the model computes with in less.
        """
        refuse_quantized(self.model)
        return own.save(self.config, self.model, self._processor, Path(folder), max_shard, tensors)

    def export(self, folder: str | Path, format: str = "hf", max_shard: int = 5_000_000_000) -> Path:
        """Write another library's layout. ``"hf"``: the class of transformers that such a model has there.

        Raises CheckpointError that names what the layout cannot hold.
        """
        writers = [reader for reader in readers() if type(reader).write is not Reader.write]
        fitting = [r for r in writers if r.layout == format and r.writes(self.config)]
        fitting = fitting or [r for r in writers if r.name == format]
        if not fitting:
            known = {reader.layout or reader.name for reader in writers}
            raise CheckpointError(f"there is no export to {format!r}; {nearest(format, known)}")
        with replaced_folder(folder) as aside:
            fitting[0].write(aside, self, max_shard)
        return Path(folder)

    def __repr__(self) -> str:
        name = self.config.provenance.preset or self.config.model.type
        return f"VLM({name}, {self.num_parameters():,} parameters, {self.dtype}, {self.device})"

    def _repr_html_(self) -> str:
        return card(self)


# ------------------------------------------------------------------------------------------------------ build and load


def build(
    config: VLMConfig | Mapping[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> VLM:
    """A freshly initialised model, with the weights that ``config.weights`` names.

    On ``"meta"`` it has shapes but no memory, and no weights are read. ``tokenizer`` (an object or a folder) overrides
    that of the configuration; without one the model has no processor. Raises ConfigError or CheckpointError.
    """
    if isinstance(config, str):
        raise ConfigError(f"build takes a configuration: chiasm.build(chiasm.preset({config!r}))")
    config, device = VLMConfig.parse(config), as_device(device) or torch.device("cpu")
    source = tokenizer if tokenizer is not None else config.tokenizer
    if source is not None and not isinstance(source, Tokenizer):
        source = Tokenizer.from_folder(source)
    if reads_nothing(config.processing):
        source = Silent()  # type: ignore[assignment]
    check_counts(config.model, unit_shapes(config))
    model = build_model(config.model, device, as_dtype(dtype))
    processor = None
    if source is not None:
        _check_vocab(config, source)
        processor = Processor(config.processing, cast(TokenizerLike, source), config.model.count)
    vlm = VLM(config, model, processor)
    if device.type != "meta":
        for part, path in config.weights.items():
            vlm.load_part(part, path)
    install(model, config.methods)
    return vlm


def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    ignore_fingerprint: bool = False,
    template: Any = None,
    vision_tower: str | Path | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
) -> VLM:
    """A model from a folder (ours, of transformers, of the original LLaVA), or from the hub where ``name`` is none.

    What a folder is is read from its ``config.json``, never from a name. ``dtype`` None keeps the type that the weights
    are stored in. ``template`` (a name or its data) is for folders that carry no chat template, ``vision_tower`` for
    checkpoints that do not hold their tower. ``allow_pickle`` permits weights that are pickles. ``ignore_fingerprint``
    loads although prompt, pixels or configuration changed; it is recorded. ``quantize`` is "int8" or "int4". The model
    is in evaluation mode.

    Raises CheckpointError (FingerprintError) or ConfigError.
    """
    if quantize is not None:
        same: dict[str, Any] = {"template": template, "vision_tower": vision_tower, "allow_pickle": allow_pickle}
        vlm = load(name, dtype, device, ignore_fingerprint=ignore_fingerprint, revision=revision, **same)
        vlm.quantize(quantize)
        return vlm
    path, device = local_folder(name, revision, allow_pickle), as_device(device)
    if own.is_adapter(path):
        of_base = {"ignore_fingerprint": ignore_fingerprint, "template": template, "vision_tower": vision_tower}
        return registry.get("adapter", "folder")(path, None, dtype, device, allow_pickle=allow_pickle, **of_base)
    values = table_of(path)
    options = Options(template, None if vision_tower is None else Path(vision_tower), allow_pickle)
    if own.is_own(values):
        options.for_none(path)
        config, model, processor = own.load(
            path, values, as_dtype(dtype), device, ignore_fingerprint, allow_pickle=allow_pickle
        )
        return VLM(config, model, processor).eval()
    found = reader_of(values, path).start(path, values, options)
    tokenizer = Silent() if found.tokenizer is None else Tokenizer.from_folder(found.tokenizer)
    model, dropped = own.filled(found.config, found.weights, found.rules, as_dtype(dtype), device)
    note = f"read from {name} (transformers or original layout)"
    config = found.config.model_copy(update={"provenance": found.config.provenance.add(note, *dropped)})
    processor = Processor(config.processing, cast(TokenizerLike, tokenizer), config.model.count)
    return VLM(config, model, processor).eval()


def read_config(folder: str | Path) -> VLMConfig:
    """The configuration of a folder of ours, of transformers or of the original LLaVA, without its weights."""
    path = Path(folder)
    values = table_of(path)
    if own.is_own(values):
        return own.parsed(values, path)
    return reader_of(values, path).read(path, values, Options()).config


def readers() -> list[Reader]:
    """One object of each registered checkpoint reader."""
    return [registry.get("checkpoint", name)() for name in registry.names("checkpoint")]


def reader_of(values: Any, path: Path) -> Reader:
    """The reader that recognises a configuration. Raises CheckpointError where none or several do."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path / 'config.json'} holds {type(values).__name__}, a table was expected")
    found = [reader for reader in readers() if reader.recognises(values)]
    if len(found) == 1:
        return found[0]
    kind = values.get("model_type")
    if TENSORS in values:
        read_json(path / "config.json")  # which is missing: that is the fault
    if found:
        names = ", ".join(type(reader).__name__ for reader in found)
        raise CheckpointError(f"{path}: {names} each take this config.json (model_type {kind!r}) for theirs")
    raise CheckpointError(
        f"{path}: no reader knows this config.json (model_type {kind!r}, no 'format' of ours); a language model or a "
        "tower alone is read into a composed model: weights: {lm: FOLDER} in its configuration, or "
        "vlm.load_part('lm', FOLDER)"
    )


def unit_shapes(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    """The shape of a unit of each kind of media that the network takes, where its front end names one."""
    shapes = {kind: front.sample_shape for kind, front in config.processing.media.items()}
    return {kind: shape for kind, shape in shapes.items() if shape is not None and kind in config.model.media}


def _place(word: Any) -> Any:
    """A device or a type from its name, or what is neither."""
    kind = SHORT.get(word) or getattr(torch, word, None) if isinstance(word, str) else word
    if isinstance(kind, torch.dtype):
        return as_dtype(kind)
    return as_device(word) if isinstance(word, str | torch.device) else word


def _check_vocab(config: VLMConfig, tokenizer: Tokenizer) -> None:
    vocab = config.model.vocab
    if vocab is not None and len(tokenizer) > vocab:
        part = "model.lm.vocab" if hasattr(config.model, "lm") else "model.encoders.text.vocab"
        part = "model.text_vocab" if hasattr(config.model, "text_vocab") else part
        raise ConfigError(
            f"the tokenizer has ids up to {len(tokenizer) - 1} but the language model {vocab} rows; set "
            f"{part} to at least {len(tokenizer)}"
        )


__all__ = ["VLM", "Chat", "build", "is_conversation", "load", "read_config"]
