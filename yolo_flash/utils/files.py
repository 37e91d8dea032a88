"""Atomic file writes, and CSV files."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # column -> value


def write_file(file: Path, content: bytes) -> None:
    """Replace a file atomically; several processes may do so at once.

    Raises:
        OSError: The folder cannot be written, or the disk is full; the file stays as it was.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # containers may share a folder and a process number
    try:
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def as_csv(columns: Collection[str], rows: Iterable[Row]) -> bytes:
    """The rows as a CSV file with a header; floats with six digits, None as an empty cell."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return file.getvalue().encode()


def from_csv(text: str, numbers: Collection[str]) -> list[Row]:
    """The rows that `as_csv` wrote.

    Args:
        text: Content of the file.
        numbers: Columns that hold numbers. All others are text: a version or a commit can look like a number.

    Returns:
        Column -> value for each row, None for an empty cell.

    Raises:
        ValueError: Something else than a number in one of those columns, or a line with another number of columns.
    """
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has another number of columns than the first line")
        rows.append({key: _value(key, cell, key in numbers, reader.line_num) for key, cell in row.items()})
    return rows


def text_and_columns(file: Path) -> tuple[str, list[str]]:
    """The content of a CSV file, and the names of its columns; ValueError if the file is not text."""
    text = file.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a mark
    return text, next(csv.reader(io.StringIO(text, newline="")), [])


def _value(column: str, cell: str, number: bool, line: int) -> Any:
    if not cell:
        return None
    if not number:
        return cell
    try:
        return int(cell) if cell.isdigit() else float(cell)
    except ValueError as error:
        raise ValueError(f"line {line}: {column} must be a number, found {cell!r}") from error
