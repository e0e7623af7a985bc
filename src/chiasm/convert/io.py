"""Tensor files: safetensors, single or sharded, read lazily and written atomically; pickles only where asked for.

A safetensors file is a JSON header and raw numbers (https://huggingface.co/docs/safetensors). A sharded checkpoint has
``model.safetensors.index.json`` beside its shards, whose ``weight_map`` says which shard holds which tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chiasm.errors import CheckpointError

WRITING = ".writing-"  # how the folder begins in which a save is prepared
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Info:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """Named tensors of a checkpoint: ``info`` of all at once, ``read`` of one at a time."""

    def __init__(self, origin: str, info: dict[str, Info]):
        self.origin = origin
        self.info = info

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, on the CPU, in the file's type."""
        raise NotImplementedError

    def dtype(self) -> torch.dtype:
        """The widest floating type among the tensors (float32 where there is none)."""
        widest: torch.dtype | None = None
        for info in self.info.values():
            if info.dtype.is_floating_point and info.dtype.itemsize > 1:
                widest = info.dtype if widest is None else torch.promote_types(widest, info.dtype)
        return widest or torch.float32


class Safetensors(Weights):
    """One or several safetensors files. Raises CheckpointError where a file is damaged or a name stands in two."""

    def __init__(self, origin: str, files: list[Path]):
        self._files: dict[str, Any] = {}
        info: dict[str, Info] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: no whole safetensors file ({error}); copy or download it again"
                ) from None
            for name in names:
                if name in info:
                    raise CheckpointError(f"{file}: tensor {name!r} stands in another file of {origin} too")
                piece = handle.get_slice(name)
                kind = piece.get_dtype()
                if kind not in _DTYPES:
                    raise CheckpointError(f"{file}: tensor {name!r} has type {kind}, which is not supported")
                info[name] = Info(tuple(piece.get_shape()), _DTYPES[kind])
                self._files[name] = handle
        super().__init__(origin, info)

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self._files[name].get_tensor(name)


class Loaded(Weights):
    """Tensors in memory: a pickle that was asked for, or a state dict."""

    def __init__(self, origin: str, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        super().__init__(origin, {n: Info(tuple(t.shape), t.dtype) for n, t in self._tensors.items()})

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self._tensors[name]


class Joined(Weights):
    """Several sources as one; raises CheckpointError where two hold the same name."""

    def __init__(self, sources: list[Weights]):
        self._owner: dict[str, Weights] = {}
        for source in sources:
            for name in source.info:
                if name in self._owner:
                    raise CheckpointError(
                        f"tensor {name!r} is in {self._owner[name].origin} and in {source.origin}; remove one of them"
                    )
                self._owner[name] = source
        info = {name: owner.info[name] for name, owner in self._owner.items()}
        super().__init__(" and ".join(s.origin for s in sources), info)

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self._owner[name].read(name)


class Renamed(Weights):
    """Tensors of another source with ``prefix`` before their names."""

    def __init__(self, source: Weights, prefix: str):
        self._source, self._prefix = source, prefix
        super().__init__(source.origin, {prefix + name: info for name, info in source.info.items()})

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self._source.read(name[len(self._prefix) :])


def open_weights(path: str | Path, allow_pickle: bool = False) -> Weights:
    """The tensors of a folder or file. Raises CheckpointError, and for a pickle unless ``allow_pickle``."""
    path = Path(path)
    if path.is_file():
        return _open_pickles(str(path), [path], allow_pickle) if path.suffix in PICKLES else _single(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if (path / INDEX).is_file():
        if (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path} holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
        return _open_index(path)
    found = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return Safetensors(str(path), found)
    if found:
        raise CheckpointError(f"{path} holds {len(found)} safetensors files but no {INDEX}; add it or join the files")
    index = path / "pytorch_model.bin.index.json"
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES and p.is_file())
    if index.is_file():
        pickles = [path / shard for shard in _shards(index)]
    if pickles:
        return _open_pickles(str(path), pickles, allow_pickle)
    raise CheckpointError(f"{path} holds no weights: {WEIGHTS} (or {INDEX} and its shards) was expected")


def refuse_program(path: Path) -> None:
    """Raises CheckpointError where a file is a TorchScript archive: a program, which is never run."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        program = any("/code/" in name for name in archive.namelist())
    if program:
        raise CheckpointError(
            f"{path} is a TorchScript archive, a program with its weights, which is not run here; where you trust it, "
            "save its tensors: python -c \"import torch, safetensors.torch as s; m = torch.jit.load('"
            f"{path.name}', 'cpu'); s.save_file({{k: v.clone() for k, v in m.state_dict().items()}}, "
            "'model.safetensors')\" and load the folder of that file, with bpe_simple_vocab_16e6.txt.gz beside it"
        )


def _single(path: Path) -> Weights:
    return Safetensors(str(path), [path])


def _open_index(folder: Path) -> Weights:
    """A sharded checkpoint whose shards hold exactly what the index says."""
    weight_map = _weight_map(folder / INDEX)
    weights = Safetensors(str(folder), [folder / shard for shard in _shards(folder / INDEX)])
    lost, extra = sorted(weight_map.keys() - weights.info.keys()), sorted(weights.info.keys() - weight_map.keys())
    if lost or extra:
        raise CheckpointError(
            f"{folder / INDEX} and its shards disagree: {len(lost)} tensors of the index have no shard"
            f"{_some(lost)}, {len(extra)} tensors of shards are not in the index{_some(extra)}; copy it again"
        )
    return weights


def _weight_map(index: Path) -> dict[str, str]:
    values = read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map'")
    return weight_map


def _shards(index: Path) -> list[str]:
    shards = sorted(set(_weight_map(index).values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index} names a shard outside its folder: {shard!r}")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names shard {shard!r}, which is missing; copy or download it again")
    return shards


def _open_pickles(origin: str, files: list[Path], allow_pickle: bool) -> Weights:
    if not allow_pickle:
        raise CheckpointError(
            f"{origin} holds its weights as a pickle ({files[0].name}), which can run code when it is opened; convert "
            "it to safetensors, or pass allow_pickle=True if you trust where it comes from"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        refuse_program(file)
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises almost anything
            raise CheckpointError(f"{file} cannot be read as plain tensors: {_first_line(error)}") from None
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values = values["model"]  # as LAVIS and its heirs save it, beside the state of their training
        if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
            raise CheckpointError(f"{file} holds something else than a table of named tensors")
        twice = sorted(tensors.keys() & values.keys())
        if twice:
            raise CheckpointError(f"{file}: tensors stand in another file of {origin} too{_some(twice)}")
        tensors |= values
    return Loaded(origin, tensors)


# ------------------------------------------------------------------------------------------------------------ writing


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard: int = 5_000_000_000) -> list[str]:
    """Write ``tensors`` into ``folder``, in shards of at most ``max_shard`` bytes; gives the file names."""
    shards: list[dict[str, Tensor]] = [{}]
    size, seen = 0, set()
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in seen:  # two names of one tensor: the format wants two copies
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file({key: _owned(tensor) for key, tensor in shard.items()}, str(folder / name), {"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(INDEX)
    return names


@contextlib.contextmanager
def replaced_folder(folder: str | Path, owned: Sequence[str] = ()) -> Iterator[Path]:
    """A new empty folder to write into, whose files take their places in ``folder`` when all of them are whole.

    Files of an older checkpoint there (weights, their index, those called as in ``owned``) that the new one does not
    have are removed; all others stay. ``config.json`` goes last, so a folder that was cut off while its files moved has
    none and is not mistaken for a checkpoint. Raises CheckpointError where the folder cannot be made.
    """
    folder = Path(folder)
    aside = folder / f"{WRITING}{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        held = next((p for p in (folder, *folder.parents) if p.is_file()), None)
        why = f"{held} is a file" if held else error.strerror or str(error)
        raise CheckpointError(f"no folder can be written at {folder}: {why}; name another") from None
    try:
        yield aside
        written = sorted(aside.iterdir(), key=lambda p: (p.name == "config.json", p.name))
        with contextlib.suppress(FileNotFoundError):
            (folder / "config.json").unlink()
        kept = {p.name for p in written}
        for old in folder.iterdir():
            stale = old.suffix == ".safetensors" or old.name == INDEX or old.name in owned
            if stale and old.is_file() and old.name not in kept:
                old.unlink()
        for path in written:
            if path.is_dir():  # a tokenizer's own folder: one of the same name is an older export's
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside)


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """JSON with a trailing newline, written aside and moved into place; ``indent`` None: all in one line."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    aside.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_first_line(error)}") from None


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and alone in its memory, as the format needs it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _some(names: list[str]) -> str:
    return f" ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def fail(origin: str, problems: list[str], remedy: str) -> NoReturn:
    """Raise one CheckpointError that lists all problems."""
    raise CheckpointError(f"{origin}: " + "; ".join(problems) + f". {remedy}")
