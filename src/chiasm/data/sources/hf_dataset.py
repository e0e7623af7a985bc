"""Data sets that the library ``datasets`` saved to a folder (``save_to_disk``). Needs the extra ``datasets``.

The tables stay on disk, mapped into memory; pictures are read as their bytes and decoded like every other picture.
"""

from __future__ import annotations

from typing import Any

from chiasm.data.base import Example, Source
from chiasm.data.sources.rows import RowsConfig, example_of
from chiasm.errors import ConfigError, DataError, nearest
from chiasm.registry import register


class HFDatasetConfig(RowsConfig):
    """``folder`` was written by ``save_to_disk``; ``split`` is needed where it holds several."""

    type: str = "hf_dataset"
    folder: str
    split: str | None = None


@register("source", "hf_dataset")
class HFDataset(Source):
    """Rows of a saved data set. Nothing is fetched from the network and no code of the data set is run."""

    Config = HFDatasetConfig

    def __init__(self, config: HFDatasetConfig):
        super().__init__(config)
        self.table = _raw(_opened(config))
        config.columns.check(self.table.column_names, config.folder)
        self.table = self.table.select_columns(config.columns.names())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.folder}: row {index} of {len(self)}")
        return example_of(self.table[index], index, self.config, self.config.folder)


def _opened(config: HFDatasetConfig) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError("source 'hf_dataset' needs datasets; pip install 'chiasm[datasets]'") from None
    try:
        found = datasets.load_from_disk(config.folder)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{config.folder}: cannot be read as a saved data set: {error}") from None
    if not isinstance(found, datasets.DatasetDict):
        if config.split is not None:
            raise ConfigError(f"{config.folder}: holds one table and no splits; leave split {config.split!r} out")
        return found
    if config.split not in found:
        raise ConfigError(f"{config.folder}: split is {config.split!r}; {nearest(config.split or '', found)}")
    return found[config.split]


def _raw(table: Any) -> Any:
    """The table with its pictures as bytes and paths, not decoded by ``datasets``."""
    import datasets

    def bare(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, dict):
            return {name: bare(inner) for name, inner in feature.items()}
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            return type(feature)(bare(feature.feature))
        return feature

    return table.cast(datasets.Features({name: bare(feature) for name, feature in table.features.items()}))
