"""BERT's input: a vector for each word, for its place and for its kind, summed and normed (arXiv:1810.04805)."""

from __future__ import annotations

from torch import Tensor, nn

from chiasm.errors import DataError


class WordEmbedding(nn.Module):
    """Words, positions counted from 0 (``positions`` 0: there are none), kinds; then a norm.

    Every text is of kind 0: what BERT's kinds tell apart (two sentences) no model here reads.
    """

    def __init__(self, vocab: int, positions: int, kinds: int, dim: int, eps: float = 1e-12):
        super().__init__()
        self.words = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(positions, dim) if positions else None
        self.kinds = nn.Embedding(kinds, dim) if kinds else None
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [B, T]`` → ``[B, T, D]``. Raises DataError where there are more words than positions."""
        x = self.words(ids)  # [B, T, D]
        if self.positions is not None:
            room, count = self.positions.num_embeddings, ids.shape[1]
            if count > room:
                raise DataError(
                    f"a text of {count} tokens does not fit the {room} positions of the model; shorten it, or set "
                    f"processing.max_length to at most {room}"
                )
            x = x + self.positions.weight[:count]
        if self.kinds is not None:
            x = x + self.kinds.weight[0]
        return self.norm(x)
