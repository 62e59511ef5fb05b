"""Where prompts come from: a text file, a column of a JSON-lines or parquet file, a text feature of a TFDS folder.

The suffix decides: `.jsonl`, `.parquet`, a folder; anything else is text with one prompt per line. All prompts are held
in memory, as text: about 150 bytes each.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from d2g_jax.records.framing import FrameError, read_frames
from d2g_jax.runtime.errors import UserError

_COLUMN = "pairs.prompts_column"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a source in order, and how often each is drawn in a row."""

    lines: tuple[str, ...]
    pairs_per_prompt: int

    def __getitem__(self, record_id: int) -> str:
        return self.lines[record_id // self.pairs_per_prompt % len(self.lines)]

    def digest(self) -> str:
        """SHA-256 (hex) of the prompts in order, the same whatever kind of file they came from."""
        escaped = (line.replace("\\", "\\\\").replace("\n", "\\n") if "\n" in line else line for line in self.lines)
        return hashlib.sha256("\n".join(escaped).encode()).hexdigest()

    @functools.cached_property
    def distinct(self) -> int:
        """How many different prompts there are; duplicates are allowed."""
        return len(set(self.lines))


def read_prompts(source: str | Path, pairs_per_prompt: int = 1, column: str = "") -> Prompts:
    """The prompts of `source`.

    Args:
      source: text with one prompt per line, `.jsonl` with one object per line, `.parquet`, or a folder that TFDS
        prepared (split train, or its only split); UTF-8 throughout.
      pairs_per_prompt: records made of each prompt.
      column: key, column or feature that holds the prompt; for a text file empty.

    Raises:
      UserError: a source that is missing, empty, of another kind or not UTF-8, a column that is not there (the message
        names those that are), a prompt that is empty or no text (the message names its row).
    """
    if not source:
        raise UserError("pairs.prompts is empty; give a text, .jsonl or .parquet file, or a TFDS folder")
    if pairs_per_prompt < 1:
        raise UserError(f"pairs.pairs_per_prompt={pairs_per_prompt}; it must be at least 1")
    source = Path(source)
    if source.is_dir():
        lines = _checked(source, "record", _tfds_values(source, column), first=0)
    elif source.suffix == ".parquet":
        lines = _checked(source, "row", _parquet_values(source, column), first=0)
    elif source.suffix == ".jsonl":
        lines = _checked(source, "line", _json_values(source, column), first=1)
    elif column:
        raise UserError(f"{source}: a text file has no columns; leave {_COLUMN} empty or give .jsonl or .parquet")
    else:
        lines = _checked(source, "line", _read_text(source).splitlines(), first=1)
    if not lines:
        raise UserError(f"{source}: no prompts in it; give at least one")
    return Prompts(lines, pairs_per_prompt)


def _checked(source: Path, unit: str, values: Iterable[Any], first: int) -> tuple[str, ...]:
    """`values` as text; refuses what is no prompt with its row, counted from `first`."""
    lines = []
    for row, value in enumerate(values, first):
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{unit} {row} is not UTF-8 at its byte {error.start}"
                raise UserError(f"{source}: {where}; save it as UTF-8") from error
        if value is not None and not isinstance(value, str):
            raise UserError(f"{source}: {unit} {row} holds {type(value).__name__}, no text; name a column of text")
        if value is None or not value.strip():
            raise UserError(f"{source}: {unit} {row} is empty; remove it or write a prompt there")
        lines.append(value)
    return tuple(lines)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); give a text, .jsonl or .parquet file, or a TFDS folder"
        ) from error


def _check_column(source: Path | str, column: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    if column not in columns:
        wrong = f"no column {column!r}" if column else f"{_COLUMN} is empty"
        raise UserError(f"{source}: {wrong}; it has {', '.join(columns) or 'none'}")


def _json_values(file: Path, column: str) -> Iterator[Any]:
    # JSON allows line separators such as U+2028 inside strings, so only "\n" ends a line.
    text = _read_text(file)
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is no JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} holds {type(row).__name__}; write one object per line")
        if column not in row:
            _check_column(f"{file}: line {number}", column, row)
        yield row[column]


def _parquet_values(file: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa  # half a second of import that other sources do not need
    import pyarrow.parquet as pq

    _check_readable(file)
    try:
        table = pq.ParquetFile(file)
        _check_column(file, column, table.schema_arrow.names)
        kind = table.schema_arrow.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(test(kind) for test in _text_types(pa)):
            raise UserError(f"{file}: column {column!r} is {kind}, no text; name a column of text")
        for batch in table.iter_batches(columns=[column]):
            # as bytes: parquet does not check that its text is UTF-8, and the message should name the row
            yield from batch.column(0).cast(pa.large_string(), safe=False).cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as parquet ({reason}); write it again or fetch it again") from error


def _text_types(pa: Any) -> tuple[Callable[[Any], bool], ...]:
    types = pa.types
    return types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary


def _check_readable(file: Path) -> None:
    """Raises `UserError` for a file that is missing or may not be read."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a file that is there") from error


def _tfds_values(folder: Path, column: str) -> Iterator[bytes]:
    """A text feature of a prepared TFDS folder, file by file, every checksum checked; TensorFlow is not imported."""
    import tensorflow_datasets as tfds  # a second of import that other sources do not need
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        info = tfds.builder_from_directory(folder).info
    except (OSError, ValueError, KeyError, tfds.core.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a folder that TFDS prepared ({reason}); give .../NAME/VERSION") from error
    texts = [name for name, kind in info.features.items() if isinstance(kind, tfds.features.Text)]
    _check_column(folder, column, texts)
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
                values = tf_example_pb2.Example.FromString(data).features.feature[column].bytes_list.value
                if len(values) != 1:
                    raise UserError(f"{file}: record {found} holds {len(values)} values of {column!r}, expected 1")
                found += 1
                yield values[0]
        except (FrameError, DecodeError) as error:
            offset = getattr(error, "offset", 0)
            raise UserError(f"{file}: corrupt at byte {offset} ({error}); prepare the data set again") from error
        if found != count:
            raise UserError(f"{file}: {found} records, dataset_info.json has {count}; prepare the data set again")
