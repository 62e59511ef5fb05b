"""Where prompts come from: lines of text, a column of CSV, JSON or parquet, a text feature of a TFDS folder.

The suffix decides (`KINDS`). All prompts are held in memory, as text: about 150 bytes each.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d2g_jax.inputs import places, text
from d2g_jax.inputs.tfds_folders import dataset_info
from d2g_jax.records.framing import FrameError, read_frames
from d2g_jax.runtime.errors import UserError

_LONGEST = 20_000  # characters of a line: more is a file of another kind
_COCO = "annotations"
_GIVE = "give .txt, .csv, .tsv, .json, .jsonl, .parquet, a folder of parquet files, or a TFDS folder"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a source in order, and how often each is drawn in a row."""

    lines: tuple[str, ...]
    pairs_per_prompt: int

    def __getitem__(self, record_id: int) -> str:
        return self.lines[record_id // self.pairs_per_prompt % len(self.lines)]

    def digest(self) -> str:
        """SHA-256 (hex) of the prompts in order, the same whatever kind of file they came from."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    @functools.cached_property
    def distinct(self) -> int:
        """How many different prompts there are; duplicates are allowed."""
        return len(set(self.lines))


def read_prompts(
    source: str | Path, pairs_per_prompt: int = 1, column: str = "", *, skip_empty: bool = False, asked: str = "column"
) -> Prompts:
    """The prompts of `source`.

    Args:
      source: a file whose suffix, of any case, is in `KINDS`, or none, which is text with one prompt per line; a folder
        of parquet files in natural order; or a folder that TFDS prepared (split train, or its only split). UTF-8.
      pairs_per_prompt: records made of each prompt.
      column: key, column or feature that holds the prompt; for a text file and a JSON list of texts empty.
      skip_empty: leave out rows that are null or blank; else they are refused.
      asked: what messages call the column: a setting or a flag.

    Raises:
      UserError: a source that is missing, empty, of another kind or not UTF-8, a column that is not there (the message
        names those that are), prompts that are empty or no text (the message counts them and names the first row).
    """
    if not str(source):
        raise UserError(f"no prompts are named; {_GIVE}")
    if "://" in str(source):
        raise UserError(f"{source}: an address; fetch the file and give its path")
    if pairs_per_prompt < 1:
        raise UserError(f"pairs.pairs_per_prompt={pairs_per_prompt}; it must be at least 1")
    source = places.expanded(source)
    if not places.is_there(source):
        raise UserError(f"{places.shown(str(source))}: No such file; {_GIVE}; a prompt itself goes to --prompt")
    kind = _folder_kind(source) if source.is_dir() else KINDS.get(source.suffix.lower())
    if kind is None:
        raise UserError(f"{source}: {source.suffix} files are not read as prompts; {_GIVE}")
    first, unit, values = kind
    lines = _checked(source, unit, values(source, _Column(column, asked)), first, skip_empty)
    if not lines:
        raise UserError(f"{source}: no prompts in it; give at least one")
    return Prompts(lines, pairs_per_prompt)


def _checked(source: Path, unit: str, values: Iterable[Any], first: int, skip_empty: bool) -> tuple[str, ...]:
    """`values` as prompts; refuses what is none with its row, counted from `first`."""
    lines, empty, count = [], [], 0
    for row, value in enumerate(values, first):
        count += 1
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{unit} {row} is not UTF-8 at its byte {error.start}"
                raise UserError(f"{source}: {where}; save it as UTF-8") from error
        if value is None or (isinstance(value, str) and not value.strip()):
            empty.append(row)
        else:
            lines.append(text.as_prompt(value, f"{source}: {unit} {row}"))
    if empty and not skip_empty:
        others = f" and so are {len(empty) - 1} more of {count}" if len(empty) > 1 else ""
        remedy = "write prompts there or remove such rows; `d2g pairs` leaves them out with pairs.skip_empty=True"
        raise UserError(f"{source}: {unit} {empty[0]} is empty{others}; {remedy}")
    return tuple(lines)


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column's name, and what messages call the setting that names it."""

    name: str
    asked: str

    def check(self, source: Path | str, columns: Iterable[str]) -> None:
        """Raises `UserError` unless it is one of `columns`."""
        columns = list(columns)
        if self.name not in columns:
            wrong = f"no column {self.name!r}" if self.name else f"{self.asked} is empty"
            raise UserError(f"{source}: {wrong}; it has {', '.join(map(str, columns)) or 'none'}")

    def refuse(self, source: Path) -> None:
        """Raises `UserError` where a column is named of a source that has none."""
        if self.name:
            raise UserError(f"{source}: has no columns, only one prompt a line; leave {self.asked} empty")


def _text_values(file: Path, column: _Column) -> Iterator[str]:
    column.refuse(file)
    for number, line in enumerate(text.lines(text.read_text(file, _GIVE)), 1):
        if len(line) > _LONGEST or "\0" in line:
            raise UserError(f"{file}: line {number} is no prompt but {len(line)} characters of another format; {_GIVE}")
        yield line


def _csv_values(file: Path, column: _Column, delimiter: str = ",") -> Iterator[Any]:
    try:
        rows = csv.DictReader(io.StringIO(text.read_text(file, _GIVE), newline=""), delimiter=delimiter, strict=True)
        column.check(file, rows.fieldnames or ())
        for row in rows:
            if None in row:  # what is behind the last column: an unquoted text would end at its first comma
                wrong = f"line {rows.line_num} has more fields than the header's {len(rows.fieldnames)}"
                raise UserError(f"{file}: {wrong}; quote text that holds {delimiter!r}")
            yield row[column.name]
    except csv.Error as error:
        raise UserError(f"{file}: cannot be read as CSV ({error}); write it again") from error


def _json_list_values(file: Path, column: _Column) -> Iterator[Any]:
    """A list of texts or of objects; or COCO's object, whose `annotations` are such a list."""
    try:
        rows = json.loads(text.read_text(file, _GIVE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON ({error}); one object per line is a .jsonl file") from error
    rows = rows.get(_COCO) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"{file}: neither a list of prompts nor captions of COCO ({_COCO}); {_GIVE}")
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            if column.name not in row:
                column.check(f"{file}: row {number}", row)
            yield row[column.name]
        else:
            column.refuse(file)
            yield row


def _json_values(file: Path, column: _Column) -> Iterator[Any]:
    for number, line in enumerate(text.lines(text.read_text(file, _GIVE)), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is no JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} holds {type(row).__name__}; write one object per line")
        if column.name not in row:
            column.check(f"{file}: line {number}", row)
        yield row[column.name]


def _parquet_values(file: Path, column: _Column) -> Iterator[Any]:
    import pyarrow as pa  # half a second of import that other sources do not need
    import pyarrow.parquet as pq

    _check_readable(file)
    try:
        table = pq.ParquetFile(file)
        column.check(file, table.schema_arrow.names)
        kind = table.schema_arrow.field(column.name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(test(kind) for test in _text_types(pa)):
            raise UserError(f"{file}: column {column.name!r} is {kind}, no text; name a column of text")
        for batch in table.iter_batches(columns=[column.name]):
            # as bytes: parquet does not check that its text is UTF-8, and the message should name the row
            yield from batch.column(0).cast(pa.large_string(), safe=False).cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as parquet ({reason}); write it again or fetch it again") from error


def _parquet_parts(folder: Path, column: _Column) -> Iterator[Any]:
    for file in _parts(folder):
        yield from _parquet_values(file, column)


def _parts(folder: Path) -> list[Path]:
    """The parquet files of a folder: part 2 before part 10."""
    found = (file for file in folder.iterdir() if file.suffix.lower() == ".parquet" and not file.name.startswith("."))
    return sorted(found, key=lambda file: text.natural_key(file.name))


def _folder_kind(folder: Path) -> _Kind:
    return (0, "row", _parquet_parts) if _parts(folder) else (0, "record", _tfds_values)


def _text_types(pa: Any) -> tuple[Callable[[Any], bool], ...]:
    types = pa.types
    return types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary


def _check_readable(file: Path) -> None:
    """Raises `UserError` for a file that is missing or may not be read."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a file that is there") from error


def _tfds_values(folder: Path, column: _Column) -> Iterator[bytes]:
    """A text feature of a prepared TFDS folder, file by file, every checksum checked; TensorFlow is not imported."""
    import tensorflow_datasets as tfds
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    info = dataset_info(folder, "give .../NAME/VERSION")
    texts = [name for name, kind in info.features.items() if isinstance(kind, tfds.features.Text)]
    column.check(folder, texts)
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise UserError(f"{folder}: its files are {info.file_format.value}; prepare the data set as tfrecord")
    if not info.splits:
        raise UserError(f"{folder}: no splits in it; prepare the data set first")
    if len(info.splits) > 1 and "train" not in info.splits:
        raise UserError(f"{folder}: splits {', '.join(info.splits)} and none is train; give a data set with train")
    split = info.splits["train"] if "train" in info.splits else next(iter(info.splits.values()))
    for name, count in zip(split.filepaths, split.shard_lengths, strict=True):
        file, found = Path(name), 0
        _check_readable(file)
        try:
            for data in read_frames(file):
                values = tf_example_pb2.Example.FromString(data).features.feature[column.name].bytes_list.value
                if len(values) != 1:
                    raise UserError(f"{file}: record {found} holds {len(values)} values of {column.name!r}, expected 1")
                found += 1
                yield values[0]
        except (FrameError, DecodeError) as error:
            offset = getattr(error, "offset", 0)
            raise UserError(f"{file}: corrupt at byte {offset} ({error}); prepare the data set again") from error
        if found != count:
            raise UserError(f"{file}: {found} records, dataset_info.json has {count}; prepare the data set again")


_Kind = tuple[int, str, Callable[[Path, _Column], Iterator[Any]]]
"""The number of the first row, what a row is called, and the reader of a kind of source."""

KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("", ".txt"), (1, "line", _text_values)),
    ".csv": (0, "row", _csv_values),
    ".tsv": (0, "row", functools.partial(_csv_values, delimiter="\t")),
    ".json": (0, "row", _json_list_values),
    ".jsonl": (1, "line", _json_values),
    ".parquet": (0, "row", _parquet_values),
}
"""By suffix in small letters; a file without one is text."""
