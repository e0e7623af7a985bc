"""Vectors of very many pictures on a Ray cluster (extra ``ray``): each actor loads the model once and embeds batches.

Only this process writes the index, so what holds for one machine holds here too: an interrupted run goes on, broken
pictures are told. All machines must see the folder under the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chiasm.infer.cluster import everywhere, joined, told


class Embedding:
    """One actor: a model, and batches of paths or texts to vectors."""

    def __init__(self, model: str, kind: str, dtype: str | None, device: str | None):
        import chiasm

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.vlm, self.kind = chiasm.load(model, device=place, dtype=getattr(torch, dtype) if dtype else None), kind

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``number``, ``item`` → ``number``, ``vector`` (zeros where ``why`` is told), ``why``."""
        from chiasm.infer import embed

        items = [str(item) for item in batch["item"]]
        vectors = np.zeros((len(items), self.vlm.config.model.dim), "float32")
        why = [""] * len(items)

        def broken(number: int, error: Exception) -> None:
            why[number] = str(error)

        for rows, found in embed.stream(
            self.vlm.model,
            self.vlm.processor,
            items,
            self.kind,  # type: ignore[arg-type]
            len(items),
            0,
            broken,
        ):
            vectors[rows] = found.numpy()
        return {"number": batch["number"], "vector": vectors, "why": np.array(why, dtype=object)}


def embedder(
    model: str, actors: int = 1, batch: int = 64, dtype: str | None = None, device: str | None = None
) -> Callable[..., Iterator[tuple[list[int], Tensor]]]:
    """What ``Index.update_folder`` takes as ``embedder``. Raises ConfigError where ray is not installed."""
    ray, model = joined(), everywhere(model)

    def run(given: Sequence[Any], kind: str, broken: Callable[[int, str], None]) -> Iterator[tuple[list[int], Tensor]]:
        with told():
            yield from shared(given, kind, broken)

    def shared(
        given: Sequence[Any], kind: str, broken: Callable[[int, str], None]
    ) -> Iterator[tuple[list[int], Tensor]]:
        items = map(str, given) if kind == "text" else (everywhere(str(item)) for item in given)
        rows = [{"number": i, "item": item} for i, item in enumerate(items)]
        found = ray.data.from_items(rows).map_batches(
            Embedding,
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_kwargs={"model": model, "kind": kind, "dtype": dtype, "device": device},
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        for part in found.iter_batches(batch_size=batch, batch_format="numpy"):
            good = [i for i, why in enumerate(part["why"]) if not why]
            for number, why in zip(part["number"].tolist(), part["why"], strict=True):
                if why:
                    broken(number, why)
            vectors = torch.from_numpy(np.stack(list(part["vector"]))[good].astype("float32"))
            if good:
                yield [int(part["number"][i]) for i in good], vectors

    return run
