"""Silence where JSON is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from ultralytics.utils import LOGGER


@contextlib.contextmanager
def quiet(really: bool) -> Iterator[None]:
    """Without Ultralytics' log, which goes to standard output; leaves its switch and torch's threads as they were."""
    disabled, threads = LOGGER.disabled, torch.get_num_threads()
    LOGGER.disabled = disabled or really
    try:
        yield
    finally:
        LOGGER.disabled = disabled
        torch.set_num_threads(threads)  # select_device, which Ultralytics' checks call too, changes it for the CPU
