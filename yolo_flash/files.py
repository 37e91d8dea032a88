"""Files that a reader never sees half of."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_file(file: Path, content: bytes) -> None:
    """Write beside the file and swap; several processes may do so at once.

    Raises:
        OSError: The folder cannot be written, or the disk is full; the file is as it was.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # containers may share a folder and a process number
    try:
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
