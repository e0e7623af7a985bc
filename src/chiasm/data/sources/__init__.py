"""Data sources, one file or folder each."""

from chiasm.data.sources import playground as playground
