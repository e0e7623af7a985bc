"""Data: sources of conversations, mixtures of them, and the way to batches."""

from chiasm.data import sources as sources
