"""Files that hold more than plain text: compressed ones, and tables of which one column is the text. No torch.

A file is what its name says: .gz, .bz2 and .xz are unpacked and read by the ending before; .json, .jsonl and .ndjson
hold a list of JSON values or one a line, .csv and .tsv a header and rows, .parquet columns. Each row is a document: its
column `text`, or the one that is named. A JSON value that is itself a string is one too, and a null is an empty one.
Nothing is guessed: a row without text in that column refuses the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, reading

COLUMN = "text"
MISSING = object()
UNPACKED: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def unpacked(path: Path, data: bytes) -> tuple[bytes, str]:
    """A file's bytes, and the ending that says what they are: what unpacks is undone, '.csv' of 'a.CSV.gz'."""
    endings = [ending.lower() for ending in path.suffixes]
    while endings and endings[-1] in UNPACKED:
        with reading(f"'{path}'"):
            data = UNPACKED[endings.pop()](data)
    return data, endings[-1] if endings else ""


def json_rows(data: bytes) -> Iterator[Any]:
    """The values of a JSON list, or of one value a line."""
    text = data.decode("utf-8-sig")
    try:
        whole = json.loads(text)
    except ValueError:
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
        return
    yield from whole if isinstance(whole, list) else [whole]


def csv_rows(data: bytes, separator: str = ",") -> Iterator[Any]:
    """The rows of a CSV file under its header; csv.Error where a row has another number of fields."""
    csv.field_size_limit(sys.maxsize)  # by itself it refuses a text of 131,072 characters
    table = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=separator, strict=True)
    for row in table:
        if None in row or None in row.values():
            raise csv.Error(f"line {table.line_num} has not as many fields as the header")
        yield row


def tsv_rows(data: bytes) -> Iterator[Any]:
    """The same with tabulators between the fields."""
    return csv_rows(data, "\t")


def parquet_rows(data: bytes) -> Iterator[Any]:
    """The rows of a Parquet file."""
    parquet: Any = importlib.import_module("pyarrow.parquet")  # untyped, and of `datasets`
    for batch in parquet.ParquetFile(io.BytesIO(data)).iter_batches():
        yield from batch.to_pylist()


ROWS: Mapping[str, Callable[[bytes], Iterator[Any]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
}


def documents(path: Path, data: bytes, ending: str, column: str) -> tuple[str, ...]:
    """The texts of a table's rows, in order.

    Args:
        path: the file, for messages.
        data: unpacked.
        ending: a key of `ROWS`.
        column: as the user named it, "" for none.

    Raises:
        BadFile: what cannot be read as its ending says, or a row without text; it lists the columns that hold any.
    """
    texts: list[str] = []
    with reading(f"'{path}'"):
        for number, row in enumerate(ROWS[ending](data), 1):
            alone = isinstance(row, str) and not column
            value = row.get(column or COLUMN, MISSING) if isinstance(row, dict) else row if alone else MISSING
            if not (value is None or isinstance(value, str)):
                raise BadFile(f"'{path}': row {number} has no text {_instead(row, column or COLUMN)}")
            texts.append(value or "")
        "\0".join(texts).encode()  # JSON can hold half a character, which no text can
    if not any(text.strip() for text in texts):
        raise BadFile(f"'{path}' holds no text")
    return tuple(texts)


def _instead(row: Any, column: str) -> str:
    """Which column was asked for, and which would have text."""
    if not isinstance(row, dict):
        return f"and no columns: it is of type {type(row).__name__}"
    there = [str(name) for name, value in row.items() if isinstance(value, str)]
    if not there:
        return f"in '{column}', nor in any other column"
    longest = max(there, key=lambda name: len(row[name]))
    return f"in '{column}'; with text it has {', '.join(there)}: name one with :column={longest}"
