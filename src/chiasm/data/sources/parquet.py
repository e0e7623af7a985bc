"""Tables in parquet files, as the hub stores most data sets. Needs the extra ``parquet`` (pyarrow).

A row is read with its row group, of which each process keeps the last few: files of small row groups (hundreds of rows)
make a shuffled order quick.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from typing import Any

from chiasm.data.base import Example, Source
from chiasm.data.sources.rows import RowsConfig, example_of, files
from chiasm.errors import ConfigError, DataError
from chiasm.registry import register

KEPT = 2  # row groups that a process holds


class ParquetConfig(RowsConfig):
    """``file`` is a path or a glob pattern; files are read in the order of their names."""

    type: str = "parquet"
    file: str


@register("source", "parquet")
class Parquet(Source):
    """Rows of parquet files. Only the columns that are named are read."""

    Config = ParquetConfig

    def __init__(self, config: ParquetConfig):
        super().__init__(config)
        self.paths = files(config.file)
        self.groups: list[tuple[int, int]] = []  # (file, row group)
        rows = []
        for number, path in enumerate(self.paths):
            file = self._open(path)
            config.columns.check(file.schema_arrow.names, path)
            for group in range(file.num_row_groups):
                self.groups.append((number, group))
                rows.append(file.metadata.row_group(group).num_rows)
        self.ends = list(accumulate(rows))
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.file}: row {index} of {len(self)}")
        group = bisect_right(self.ends, index)
        table, place = self._group(group), index - (self.ends[group - 1] if group else 0)
        row = table.slice(place, 1).to_pylist()[0]
        return example_of(row, index, self.config, self.paths[self.groups[group][0]])

    def _group(self, group: int) -> Any:
        if group not in self._kept:
            file, number = self.groups[group]
            self._kept[group] = self._open(self.paths[file]).read_row_group(number, columns=self.config.columns.names())
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _open(self, path: str) -> Any:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ConfigError("source 'parquet' needs pyarrow; pip install 'chiasm[parquet]'") from None
        try:
            return pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as a parquet file: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}
