"""Life without a network: one short probe instead of Ultralytics' minutes of retries, and a stand-in for coco8."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ultralytics.utils import DATASETS_DIR, LOGGER, SETTINGS, USER_CONFIG_DIR, downloads
from ultralytics.utils.checks import check_file

from .standin import create_standin

DOWNLOAD_HOST = "github.com"  # data sets and weights of Ultralytics come from its releases
PROBE_SECONDS = 3.0
STANDIN_FOLDER = USER_CONFIG_DIR / "yolo-flash" / "coco8-stand-in"


def can_download() -> bool:
    """Whether Ultralytics' download host, or the proxy to it, accepts a connection within 3 seconds.

    The name look-up is part of the 3 seconds: without a route it can hang by itself. `YOLO_OFFLINE=true` answers no.
    """
    if os.environ.get("YOLO_OFFLINE", "").lower() in ("1", "true"):
        return False
    proxy = urlsplit(urllib.request.getproxies().get("https", ""))
    host, port = (proxy.hostname, proxy.port or 80) if proxy.hostname else (DOWNLOAD_HOST, 443)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:
        pool.submit(socket.create_connection, (host, port), PROBE_SECONDS).result(PROBE_SECONDS).close()
    except (OSError, concurrent.futures.TimeoutError):
        return False
    finally:
        pool.shutdown(wait=False)
    return True


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """For the time of the context Ultralytics' downloads fail at once, where they would retry for minutes."""
    original = downloads.safe_download

    def fail(url: Any, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError(f"{url} not downloaded: {DOWNLOAD_HOST} did not answer within {PROBE_SECONDS:.0f} s")

    downloads.safe_download = fail
    try:
        yield
    finally:
        downloads.safe_download = original


def missing_asset(weights: str | Path) -> bool:
    """Whether `weights` names an official file that Ultralytics would have to download."""
    name = Path(str(weights))
    on_disk = name.exists() or (Path(SETTINGS["weights_dir"]) / name).exists()
    return name.name in downloads.GITHUB_ASSETS_NAMES and not on_disk


def training_data(data: Any) -> Any:
    """The data set to train on: `data` itself wherever Ultralytics can find or download it.

    Args:
        data: What the user gave as `data=`.

    Returns:
        `<YOLO_FLASH_DATASETS>/<name>/data.yaml` for `<name>.yaml` if that folder has it; the stand-in's data.yaml for
        coco8 that is neither on disk nor to be downloaded; else `data`.
    """
    name = str(data)
    folder = os.environ.get("YOLO_FLASH_DATASETS")
    if folder and name == Path(name).name and not Path(name).exists():
        local = Path(folder) / Path(name).stem / "data.yaml"
        if local.is_file():
            LOGGER.info(f"yolo-flash: data={name} is read from {local} (YOLO_FLASH_DATASETS)")
            return str(local)
    if not _is_shipped_coco8(name) or (Path(DATASETS_DIR) / "coco8" / "images" / "val").exists() or can_download():
        return data
    yaml = create_standin(STANDIN_FOLDER)
    LOGGER.warning(
        "yolo-flash: coco8 is not on this machine and cannot be downloaded "
        f"({DOWNLOAD_HOST} did not answer within {PROBE_SECONDS:.0f} s). TRAINING ON A STAND-IN: eight pictures cut from "
        f"the two photographs that ultralytics ships, in {STANDIN_FOLDER}. It shows that training works; its mAP means "
        f"nothing. The real set: connect to the network once, or unpack coco8.zip into {DATASETS_DIR}."
    )
    return str(yaml)


def note_standin(data: Any, save_dir: Path) -> None:
    """Leave a note in the run folder when the run trains on the stand-in."""
    if Path(str(data)).parent == STANDIN_FOLDER:
        (save_dir / "TRAINED_ON_A_STAND_IN.txt").write_text(
            f"This run did not see coco8. The data set could not be downloaded, so yolo-flash trained on eight pictures "
            f"cut from the two photographs that the ultralytics package ships: {data}\n",
            encoding="utf-8",
        )


def _is_shipped_coco8(name: str) -> bool:
    if Path(name).name not in ("coco8", "coco8.yaml"):
        return False
    shipped = check_file("coco8.yaml", hard=False)  # a coco8.yaml in the working directory is the user's own and wins
    return bool(shipped) and Path(shipped).parent == Path(downloads.__file__).parents[1] / "cfg" / "datasets"
