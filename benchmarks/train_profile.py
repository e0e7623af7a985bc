"""Where the time of a training step goes: torch's profiler over the counted steps, its operations in named groups."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

TOWER, UPDATE, DATA = MARKS = "part:tower", "part:update", "part:data"
GROUPS = {
    "layers": "matrix products of the layers",
    "attention": "attention: scores, softmax, mixing",
    "head": "head and cross-entropy, at targets only",
    "tower": "tower (frozen, forwards only)",
    "update": "clipping, AdamW, masters into the model, proofs",
    "copies": "copies and casts",
    "elementwise": "norms, rotations, gates, sums",
    "data": "waiting for data (made in this process)",
    "python": "Python and all that is no operation of torch",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "aten::_addmm_activation")
ATTENTION = ("bmm", "softmax", "scaled_dot_product", "_flash_attention")
COPIES = ("copy_", "aten::to", "_to_copy", "clone", "contiguous", "aten::cat", "aten::empty", "aten::zeros", "fill_")


class Steps:
    """Profiles the steps after the first ``since`` of a run; ``table`` gives seconds of a step by group."""

    def __init__(self, run: Any, vocab: int, since: int):
        self.run, self.vocab, self.since, self.done = run, vocab, since, 0
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self.begun = self.seconds = 0.0
        for tower in run.model.encoders.values():
            _mark(tower)
        over = run.waits.over
        run.waits.over = lambda items: over(_marked(items))

    def step(self, stop: int) -> None:
        """After each step; ends at step ``stop``."""
        self.done += 1
        if self.done == self.since:
            self.profiler.start()
            self.begun = time.perf_counter()
        if self.done == stop:
            self.seconds = time.perf_counter() - self.begun
            self.profiler.stop()

    def table(self) -> dict[str, float]:
        """Seconds a step by group; what operations do not account for is Python's."""
        found = dict.fromkeys(GROUPS, 0.0)
        for event in self.profiler.events():
            group, seconds = self._group(event)
            if group:
                found[group] += seconds / 1e6
        found["python"] = max(0.0, self.seconds - sum(found.values()))
        return {name: seconds / (self.done - self.since) for name, seconds in found.items()}

    def _group(self, event: Any) -> tuple[str | None, float]:
        if event.name in MARKS:  # all of it, with what it calls
            return event.name.removeprefix("part:"), event.cpu_time_total
        parent = event.cpu_parent
        while parent is not None:
            if parent.name in MARKS:
                return None, 0.0
            parent = parent.cpu_parent
        if not event.name.startswith("aten::"):
            return None, 0.0  # Python's functions: what their operations take is counted there
        own = event.self_cpu_time_total
        if any(self.vocab in shape for shape in event.input_shapes if shape):
            return "head", own
        for group, names in (("attention", ATTENTION), ("layers", PRODUCTS), ("copies", COPIES)):
            if any(name in event.name for name in names):
                return group, own
        return "elementwise", own


def _marked(items: Iterable[Any]) -> Iterator[Any]:
    source = iter(items)
    while True:
        with torch.profiler.record_function(DATA):
            try:
                item = next(source)
            except StopIteration:
                return
        yield item


def _mark(tower: nn.Module) -> None:
    marks: list[Any] = []

    def enter(*_: Any) -> None:
        marks.append(torch.profiler.record_function(TOWER).__enter__())

    def leave(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    tower.register_forward_pre_hook(enter)
    tower.register_forward_hook(leave)
