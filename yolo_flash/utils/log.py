"""Ultralytics' log switched off, for commands that print JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from ultralytics.utils import LOGGER


@contextlib.contextmanager
def log_disabled(disable: bool) -> Iterator[None]:
    """Disable Ultralytics' log, which goes to standard output; afterwards restore its switch and torch's threads."""
    disabled, threads = LOGGER.disabled, torch.get_num_threads()
    LOGGER.disabled = disabled or disable
    try:
        yield
    finally:
        LOGGER.disabled = disabled
        torch.set_num_threads(threads)  # Ultralytics' select_device and checks change it for the CPU
