"""Parquet tables as records (K2.5 §3.3).

Access is random, by row groups: a shuffled pass reads one for nearly every record. Turn large tables into ArrayRecord
first, with `k25 data build`. What a footer says is checked against the file before anything is read: the rows that a file
claims are bounded by its bytes, and those of a group are read in pieces until they exceed a limit.
"""

import threading
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from k25_jax.data.archives import Archives
from k25_jax.data.captions import printable
from k25_jax.data.records import DataError, RecordError
from k25_jax.runtime.paths import AnyPath, Reader, is_remote, open_random

MAX_GROUP_BYTES = 2**31  # a row group, uncompressed
MAX_GROUP_ROWS = 2**26  # what writers take at most
MAX_FOOTER_BYTES = 2**25
ROWS_A_BYTE = 1024  # of the file; a million equal or empty values have less than 600
ROWS_COUNTED = 8  # in a file with more rows a byte they are counted, as their values must be almost equal
BATCH_ROWS = 1024


class ParquetTables(Archives):
    """Parquet files (one, a folder or a pattern): a row is a record, its columns the fields; see `data.forms`.

    Binary columns, and structs of `bytes` and `path`, are media.
    """

    suffixes = (".parquet", ".pq")

    def __init__(self, path: str):
        self._tables: list[pa.parquet.ParquetFile] = []
        self._groups: list[np.ndarray] = []  # of each file, the row at which each of its groups ends
        self._lock = threading.Lock()  # a table is read by one thread at a time
        self._held: tuple[int, int, pa.Table | RecordError] | None = None  # the row group that was read last
        super().__init__(path)

    def open(self, file: AnyPath) -> int:
        try:
            size = _check_footer(file)
            opened = open_random(file) if is_remote(file) else file
            table = pa.parquet.ParquetFile(opened, memory_map=opened is file, page_checksum_verification=True)
            rows = _rows(table, size)
        except (pa.ArrowException, OSError, ValueError) as problem:
            raise DataError(
                f"data.sources: {file} is no Parquet file, or is damaged ({problem}); fetch it again"
            ) from None
        self._tables.append(table)
        self._groups.append(np.cumsum(rows, dtype=np.int64))
        return sum(rows)

    def label(self, index: int) -> str:
        file, row = self.place(index)
        return f"{printable(str(self._files[file]))}[{row}]"

    def root(self, index: int) -> AnyPath:
        return self._files[self.place(index)[0]].parent

    def read(self, index: int) -> Mapping:
        file, row = self.place(index)
        group = int(np.searchsorted(self._groups[file], row, side="right"))
        first = int(self._groups[file][group - 1]) if group else 0
        with self._lock:
            if self._held is None or self._held[:2] != (file, group):
                self._held = None  # its memory goes before the next is read
                self._held = (file, group, self._read_group(file, group))
            table = self._held[2]
        if isinstance(table, RecordError):
            raise RecordError(table.reason, str(table))
        try:
            (record,) = table.slice(row - first, 1).to_pylist()
        except UnicodeDecodeError as problem:
            raise RecordError("utf-8", f"a column is not UTF-8 ({problem})") from None
        except (pa.ArrowException, ValueError, OverflowError, ArithmeticError) as problem:
            raise RecordError("archive", f"its columns are damaged ({problem})") from None
        return record

    def _read_group(self, file: int, group: int) -> pa.Table | RecordError:
        """A row group, in pieces: a dictionary's entry of a few bytes may be repeated without end."""
        table = self._tables[file]
        metadata = table.metadata.row_group(group)
        size, batches, held = metadata.total_byte_size, [], 0
        if size > MAX_GROUP_BYTES:
            return _too_large(size)
        try:
            for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                batches.append(batch)
                held += batch.nbytes
                if held > MAX_GROUP_BYTES:
                    return _too_large(held)
            found = pa.Table.from_batches(batches)
        except (pa.ArrowException, OSError, ValueError) as problem:
            return RecordError("archive", f"row group {group} is damaged ({problem})")
        if len(found) != metadata.num_rows:
            return RecordError(
                "archive", f"row group {group} has {len(found)} rows, not {metadata.num_rows} as it says"
            )
        return found


def _too_large(size: int) -> RecordError:
    return RecordError("too large", f"a row group of {size} bytes; write groups of less than {MAX_GROUP_BYTES}")


def _check_footer(file: AnyPath) -> int:
    """The bytes of a file; ValueError for a footer that is larger than it may be. The library checks the rest."""
    with Reader(file) as reader:
        size, end = reader.size, reader.read_at(8, max(0, reader.size - 8))
    if len(end) == 8 and end[4:] == b"PAR1" and int.from_bytes(end[:4], "little") > min(size, MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {int.from_bytes(end[:4], 'little')} bytes")
    return size


def _rows(table: pa.parquet.ParquetFile, size: int) -> list[int]:
    """The rows of each group; raises ValueError where a file of `size` bytes cannot hold them, or does not.

    Of a damaged footer only these numbers are safe to ask for: the library aborts over some of what it says of columns.
    """
    metadata = table.metadata
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or metadata.num_rows != sum(rows):
        raise ValueError(
            f"it says it has {metadata.num_rows} rows, its groups {sum(rows)}, the least of them {min(rows, default=0)}"
        )
    if max(rows, default=0) > MAX_GROUP_ROWS or sum(rows) > ROWS_A_BYTE * size:
        raise ValueError(f"it says it has {sum(rows)} rows in {size} bytes")
    if sum(rows) > ROWS_COUNTED * size:
        for number, claimed in enumerate(rows):
            column = table.schema_arrow.names[:1]
            found = sum(
                map(len, table.iter_batches(BATCH_ROWS, row_groups=[number], columns=column, use_threads=False))
            )
            if found != claimed:
                raise ValueError(f"row group {number} has {found} rows, not {claimed} as it says")
    return rows
