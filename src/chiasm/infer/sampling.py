"""How the next token is chosen from logits: greedy, temperature, top-k, top-p, repetition penalty.

Papers: nucleus sampling (arXiv:1904.09751), the repetition penalty of CTRL (arXiv:1909.05858). Reference: the logits
processors of transformers, in the same order: penalty, temperature, top-k, top-p.

Differences by design: the penalty never sees padding; each row draws from a generator of its own, so that a row of a
batch is sampled as it would be alone.
"""

from __future__ import annotations

import math
import os

import torch
from pydantic import Field, model_validator
from torch import Tensor

from chiasm.config import Config
from chiasm.errors import NumberError


class Sampling(Config):
    """How one answer is chosen, and when it ends. ``temperature`` 0 is greedy; ``seed`` None draws one.

    ``presence_penalty`` and ``frequency_penalty`` are OpenAI's: subtracted once, or for each time, that a token stands
    in the answer; ``repetition_penalty`` counts the prompt too. ``logit_bias`` maps ids to what is added to their
    logits. ``logprobs`` is how many of the best tokens are told beside each chosen one (0: the chosen only).
    ``prompt_lookup`` is how many tokens may be guessed from what stands in prompt and answer: a greedy answer is then
    the same and, where it repeats them, comes faster.
    """

    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    logprobs: int | None = Field(None, ge=0)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    prompt_lookup: int = Field(0, ge=0, le=15)

    @model_validator(mode="after")
    def _possible(self) -> Sampling:
        if "" in self.stop:
            raise ValueError("an empty stop string would stop at once")
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self


class Options(Sampling):
    """All choices of ``generate``: those of an answer, and beam search."""

    num_beams: int = Field(1, ge=1)
    length_penalty: float = 1.0
    use_cache: bool = True

    @model_validator(mode="after")
    def _agrees(self) -> Options:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"beam search takes no chances: num_beams={self.num_beams} needs temperature=0")
        fields = ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "ignore_eos", "min_tokens")
        given = [
            name
            for name in fields
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if self.num_beams > 1 and given:
            raise ValueError(f"beam search (num_beams={self.num_beams}) does not know {', '.join(given)}: leave it out")
        if self.temperature == 0 and (self.top_k or self.top_p is not None or self.min_p):
            raise ValueError(
                "top_k, top_p and min_p choose among sampled tokens: give a temperature above 0, or leave them out"
            )
        return self


class Sampler:
    """Chooses one token a row. ``seeds`` are the rows' own; they are drawn where the options give none."""

    def __init__(self, options: Sampling, rows: int):
        self.options = options
        self.seeds = [fresh_seed() if options.seed is None else options.seed for _ in range(rows)]
        # Generators stay on the CPU: the same seed gives the same text on every device.
        self.generators = [torch.Generator(device="cpu").manual_seed(seed) for seed in self.seeds]

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """``logits [R, V]``, ``seen [R, V]`` (ids that the penalty lowers) → ids ``[R]``."""
        scores = logits.float()
        if seen is not None:
            scores = penalise(scores, seen, self.options.repetition_penalty)
        if self.options.temperature == 0:
            return scores.argmax(dim=-1)
        probabilities = self.filter(scores).softmax(dim=-1)  # [R, V]
        draws = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])  # [R]
        return invert(probabilities, draws.to(logits.device))

    def filter(self, scores: Tensor) -> Tensor:
        """Scores ``[R, V]`` after temperature, top-k and top-p; minus infinity where a token is out of the question."""
        scores = scores / self.options.temperature
        if self.options.top_k is not None:
            scores = keep_top_k(scores, self.options.top_k)
        if self.options.top_p is not None:
            scores = keep_top_p(scores, self.options.top_p)
        if self.options.min_p:
            scores = keep_min_p(scores, self.options.min_p)
        return scores

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.generators = [self.generators[row] for row in rows]


def check_finite(highest: float) -> None:
    """Raises NumberError where the highest score of a next token is no number: any choice would be arbitrary."""
    if not math.isfinite(highest):
        raise NumberError(
            "the model's scores of the next token are NaN or infinite: in float16 its numbers may be too large (load "
            "it with dtype bfloat16 or float32), or a weight of it is broken"
        )


def fresh_seed() -> int:
    """A seed from the operating system: torch's global generator is neither read nor advanced."""
    return int.from_bytes(os.urandom(7), "big")


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores ``[R, V]`` of ids in ``seen [R, V]`` divided by ``penalty`` where positive, multiplied where negative."""
    if penalty == 1.0:
        return scores
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The ``k`` best of each row ``[R, V]`` (with those that equal the k-th), minus infinity elsewhere."""
    worst = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < worst, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest best tokens of each row ``[R, V]`` whose probability reaches ``p``, minus infinity elsewhere."""
    ordered, order = scores.sort(dim=-1)  # the least likely first
    out = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    out[..., -1] = False  # the best token always stays
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """The tokens of each row ``[R, V]`` at least ``p`` times as likely as its best, minus infinity elsewhere."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The id at which the running sum of ``probabilities [R, V]`` passes ``draws [R]`` (each in [0, 1)) → ``[R]``."""
    running = probabilities.double().cumsum(dim=-1)  # [R, V]
    targets = (draws * running[:, -1]).unsqueeze(-1)
    return torch.searchsorted(running, targets, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)
