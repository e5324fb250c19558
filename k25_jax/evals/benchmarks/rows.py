"""Rows of a benchmark's file as it was published: Parquet, JSONL, JSON, CSV or TSV."""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence

from k25_jax.data.media import resolve_media
from k25_jax.data.parquet import ParquetTables
from k25_jax.data.records import DataError, RecordError, decode_text, read_bytes
from k25_jax.data.sources import Jsonl
from k25_jax.runtime.paths import AnyPath, to_path

BASE64_LEAST = 300  # characters: a shorter string in a column of images is a path


class Rows:
    """All rows of a file, or of a folder of Parquet files. Parquet is read when a row is asked for, the rest at once."""

    def __init__(self, path: str | AnyPath):
        self.path = to_path(path, "--data")
        suffix = self.path.suffix.lower()
        if not self.path.exists():
            raise DataError(f"--data: there is nothing at {path}; give the benchmark's file as it was published")
        if self.path.is_dir() or suffix in ParquetTables.suffixes:
            self._source, self._rows = ParquetTables(str(path)), None
        elif suffix in (".jsonl", ".ndjson"):
            self._source, self._rows = Jsonl(str(path)), None
        elif suffix in (".json", ".csv", ".tsv"):
            self._source, self._rows = None, (_json if suffix == ".json" else _table)(self.path)
        else:
            raise DataError(f"--data: {path}: its name must end in .parquet, .jsonl, .json, .csv or .tsv")
        self._held: tuple[int, Mapping] = (-1, {})  # the row that was read last: its fields are asked for one by one
        if not len(self):
            raise DataError(f"--data: {path} has no rows")

    def __len__(self) -> int:
        return len(self._source if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> Mapping:
        if self._rows is not None:
            return self._rows[index]
        if self._held[0] != index:
            try:
                self._held = (index, self._source.read(index))
            except RecordError as problem:
                raise DataError(f"{self.label(index)}: {problem}") from None
        return self._held[1]

    def label(self, index: int) -> str:
        """What errors call a row."""
        return self._source.label(index) if self._rows is None else f"{self.path}[{index}]"

    def files(self) -> list[AnyPath]:
        """The files that the rows are read from."""
        return [self.path] if self._source is None else self._source.files()

    @property
    def root(self) -> AnyPath:
        """The folder that paths to media start from."""
        return self.path if self.path.is_dir() else self.path.parent

    def field(self, index: int, names: Sequence[str], wanted: type | tuple[type, ...] = str, default=...):
        """The first of the fields `names` that the row has and that is not null.

        Raises DataError for none, unless there is a default, and for one of another type.
        """
        row = self[index]
        for name in names:
            if (value := row.get(name)) is not None:
                if not isinstance(value, wanted):
                    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
                    raise DataError(
                        f"{self.label(index)}: {name} must be {' or '.join(k.__name__ for k in kinds)}, "
                        f"not {type(value).__name__}"
                    )
                return value
        if default is ...:
            raise DataError(
                f"{self.label(index)}: has no {' or '.join(names)}, only {', '.join(map(str, sorted(row)))[:300]}; "
                "is it this benchmark's file?"
            )
        return default

    def medium(self, index: int, names: Sequence[str], kind: str = "image") -> bytes | AnyPath:
        """Image or video of a row: bytes, or a path below the file's folder; raises DataError."""
        value = self.field(index, names, (str, bytes, Mapping))
        try:
            if isinstance(value, str) and len(value) > BASE64_LEAST:
                return resolve_media({f"{kind}_base64": value}, None)[kind]
            found = resolve_media({kind: value}, self.root)[kind]
        except RecordError as problem:
            raise DataError(f"{self.label(index)}: {names[0]}: {problem}") from None
        if not isinstance(found, (bytes, AnyPath)):
            raise DataError(f"{self.label(index)}: {names[0]} must have bytes or a path, not {sorted(found)}")
        return found


def _json(path: AnyPath) -> list[Mapping]:
    """A list of objects, one below "data", or an object of objects by their ids."""
    parsed = json_value(_text(path), str(path))
    if isinstance(parsed, dict):
        parsed = parsed["data"] if isinstance(parsed.get("data"), list) else list(parsed.values())
    if not isinstance(parsed, list) or not all(isinstance(row, dict) for row in parsed):
        raise DataError(f"{path}: must be a list of objects, or an object of them")
    return parsed


def _table(path: AnyPath) -> list[Mapping]:
    """Lines of a CSV or TSV file; empty cells are left out."""
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    csv.field_size_limit(min(sys.maxsize, 2**28))
    try:
        lines = list(csv.DictReader(io.StringIO(_text(path), newline=""), dialect=dialect, strict=True))
    except csv.Error as problem:
        raise DataError(f"{path}: is no table ({problem}); fetch it again") from None
    return [{key: cell for key, cell in line.items() if key and isinstance(cell, str) and cell} for line in lines]


def _text(path: AnyPath) -> str:
    try:
        return decode_text(read_bytes(path), str(path))
    except RecordError as problem:
        raise DataError(str(problem)) from None


def json_value(text: str, where: str):
    """JSON, or DataError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{where}: is not JSON ({problem})") from None
