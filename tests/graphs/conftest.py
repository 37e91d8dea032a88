"""A model for the tests of graphs."""

from __future__ import annotations

from typing import Any

import pytest
from ultralytics import YOLO


@pytest.fixture(scope="package")
def detector() -> Any:
    return YOLO("yolo12n.yaml").model
