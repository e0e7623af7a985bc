"""Counters for Prometheus, under the names that dashboards of vLLM know (``chiasm:`` instead of ``vllm:``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Labels = tuple[tuple[str, str], ...]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


@dataclass
class Counter:
    """A number that only grows, for each set of labels."""

    name: str
    help: str
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count."""
        key = tuple(sorted(labels.items()))
        with _lock:
            self.values[key] = self.values.get(key, 0) + amount

    def lines(self) -> Iterable[str]:
        """The text of Prometheus."""
        return _block(self.name + "_total", self.help, "counter", dict(self.values))


@dataclass
class Histogram:
    """How often a value was at most each of some bounds, for each set of labels."""

    name: str
    help: str
    bounds: tuple[float, ...]
    counts: dict[Labels, list[int]] = field(default_factory=dict)
    sums: dict[Labels, float] = field(default_factory=dict)

    def see(self, value: float, **labels: str) -> None:
        """Count one value."""
        key = tuple(sorted(labels.items()))
        with _lock:
            counts = self.counts.setdefault(key, [0] * (len(self.bounds) + 1))
            counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
            self.sums[key] = self.sums.get(key, 0.0) + value

    def lines(self) -> Iterable[str]:
        """The text of Prometheus."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        for key, counts in list(self.counts.items()):
            seen = 0
            for bound, count in zip([*map(_number, self.bounds), "+Inf"], counts, strict=True):
                seen += count
                yield f"{self.name}_bucket{_labels((*key, ('le', bound)))} {seen}"
            yield f"{self.name}_sum{_labels(key)} {_number(self.sums[key])}"
            yield f"{self.name}_count{_labels(key)} {seen}"


class Metrics:
    """Everything a server counts. ``gauges`` are read when they are asked for."""

    def __init__(self) -> None:
        self.success = Counter("chiasm:request_success", "Answers that were completed.")
        self.prompt_tokens = Counter("chiasm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = Counter("chiasm:generation_tokens", "Tokens that were written.")
        self.rejections = Counter("chiasm:admission_rejections", "Requests that found no room.")
        self.cancelled = Counter("chiasm:request_cancelled", "Requests whose client went away.")
        self.responses = Counter("chiasm:http_responses", "HTTP responses.")
        self.first = Histogram("chiasm:time_to_first_token_seconds", "From the request to its first token.", SECONDS)
        self.between = Histogram("chiasm:inter_token_latency_seconds", "Mean time between tokens of an answer.", SHORT)
        self.whole = Histogram("chiasm:e2e_request_latency_seconds", "From the request to its last token.", SECONDS)
        self.lengths = Histogram("chiasm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.written = Histogram("chiasm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.opening = Histogram("chiasm:image_decode_seconds", "To open the pictures of a request.", SECONDS)
        self.gauges: list[Callable[[], Iterable[str]]] = []

    def text(self) -> str:
        """The whole page."""
        parts = [*vars(self).values()]
        lines = [line for part in parts if isinstance(part, Counter | Histogram) for line in part.lines()]
        return "\n".join([*lines, *(line for gauge in self.gauges for line in gauge())]) + "\n"


def gauge(name: str, help: str, values: Mapping[Labels, float], kind: str = "gauge") -> Iterable[str]:
    """The text of numbers that are read now."""
    return _block(name, help, kind, values)


_lock = threading.Lock()


def _block(name: str, help: str, kind: str, values: Mapping[Labels, float]) -> Iterable[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
    for key, value in values.items():
        yield f"{name}{_labels(key)} {_number(value)}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for k, v in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
