"""Runs without a network: a short probe instead of Ultralytics' minutes of retries, and a stand-in for coco8."""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import SplitResult, unquote, urlsplit

from ultralytics.utils import DATASETS_DIR, LOGGER, ROOT, SETTINGS, USER_CONFIG_DIR, downloads, env_bool
from ultralytics.utils.checks import check_file, check_yolov5u_filename

from .coco8_standin import create_standin

DOWNLOAD_HOST = "github.com"  # data sets and weights of Ultralytics come from its releases
PROBE_SECONDS = 3.0
STANDIN_FOLDER = USER_CONFIG_DIR / "yolo-flash" / "coco8-stand-in"

_downloads_lock = threading.Lock()
_replaced: list[Callable[..., Any]] = []  # what stood in the place of `safe_download`, for each context under way


def can_download() -> bool:
    """Whether Ultralytics' download host, or the proxy to it, accepts a connection within 3 seconds.

    The 3 seconds include the name look-up, which can hang without a route. `YOLO_OFFLINE=true` answers no.
    """
    if env_bool("YOLO_OFFLINE"):
        return False
    answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
    # A daemon thread: at its exit the interpreter waits for all others, however long a look-up hangs.
    threading.Thread(target=lambda: answer.put(_connects()), daemon=True).start()
    try:
        return answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return False


def why_not() -> str:
    """The clause that explains a `can_download()` of False."""
    if env_bool("YOLO_OFFLINE"):
        return "YOLO_OFFLINE is set"
    return f"{DOWNLOAD_HOST} did not answer within {PROBE_SECONDS:g} s"


def _connects() -> bool:
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    try:
        if not proxy or urllib.request.proxy_bypass(DOWNLOAD_HOST):
            socket.create_connection((DOWNLOAD_HOST, 443), PROBE_SECONDS).close()
            return True
        return _proxy_connects(urlsplit(proxy if "://" in proxy else f"http://{proxy}"))
    except (OSError, ValueError, OverflowError):  # the latter two: the proxy's address is none
        return False


def _proxy_connects(proxy: SplitResult) -> bool:
    """Whether the proxy lets the download host through; many proxies refuse all hosts but package registries."""
    default = 443 if proxy.scheme == "https" else 1080 if proxy.scheme.startswith("socks") else 80
    with socket.create_connection((proxy.hostname or "", proxy.port or default), PROBE_SECONDS) as connection:
        if proxy.scheme != "http":
            return True  # a question would need TLS or SOCKS: Ultralytics' own attempt decides
        login = ""
        if proxy.username:
            secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
            login = f"Proxy-Authorization: Basic {base64.b64encode(secret).decode()}\r\n"
        request = f"CONNECT {DOWNLOAD_HOST}:443 HTTP/1.1\r\nHost: {DOWNLOAD_HOST}:443\r\n{login}\r\n"
        connection.sendall(request.encode())
        status = connection.recv(64).split()  # b"HTTP/1.1 200 Connection established"
        return len(status) > 1 and status[1].startswith(b"2")


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Within the context Ultralytics' downloads fail at once instead of being retried for minutes."""
    with _downloads_lock:
        _replaced.append(downloads.safe_download)
        downloads.safe_download = _fail
    try:
        yield
    finally:
        with _downloads_lock:  # trainings in two threads may overlap: the last to leave puts the original back
            original = _replaced.pop()
            if not _replaced:
                downloads.safe_download = original


def _fail(url: object, *args: object, **kwargs: object) -> NoReturn:
    raise ConnectionError(f"{url} not downloaded: {why_not()}")


def missing_asset(weights: str | Path) -> bool:
    """Whether `weights` names an official file that Ultralytics would have to download."""
    if "://" in str(weights):  # another host, of which the probe says nothing
        return False
    name = Path(check_yolov5u_filename(str(weights), verbose=False))
    on_disk = name.exists() or (Path(SETTINGS["weights_dir"]) / name).exists()
    return name.name in downloads.GITHUB_ASSETS_NAMES and not on_disk


def out_of_reach(weights: str | Path) -> bool:
    """Whether `weights` names an official file that is neither on disk nor to be downloaded."""
    return missing_asset(weights) and not can_download()


def without_amp_weights() -> contextlib.AbstractContextManager[object]:
    """Spare Ultralytics' check of AMP, within the context, the minutes in which it asks for weights out of reach."""
    return no_downloads() if out_of_reach("yolo26n.pt") else contextlib.nullcontext()


def data_within_reach(data: Any) -> Any:
    """The data set of a run: `data` itself wherever Ultralytics can find or download it.

    Returns:
        For `<name>.yaml`, `<YOLO_FLASH_DATASETS>/<name>/data.yaml` if that file exists; for a coco8 that is neither on
        disk nor downloadable, the data.yaml of the stand-in; else `data`.
    """
    if not isinstance(data, (str, Path)):
        return data
    name = str(data)
    folder = os.environ.get("YOLO_FLASH_DATASETS")
    if folder and name == Path(name).name and not Path(name).exists():
        local = Path(folder) / Path(name).stem / "data.yaml"
        if local.is_file():
            LOGGER.info(f"yolo-flash: data={name} is read from {local} (YOLO_FLASH_DATASETS)")
            return str(local)
    if not _is_shipped_coco8(name) or _coco8_on_disk() or can_download():
        return data
    yaml = create_standin(STANDIN_FOLDER)
    LOGGER.warning(
        f"yolo-flash: coco8 is not on this machine and cannot be downloaded ({why_not()}). "
        f"A STAND-IN TAKES ITS PLACE: eight pictures cut from the two photographs that ultralytics ships, in "
        f"{STANDIN_FOLDER}. It shows that things work; its mAP means nothing. "
        f"The real set: connect to the network once, or unpack coco8.zip into {DATASETS_DIR}."
    )
    return str(yaml)


def note_standin(data: Any, save_dir: Path) -> None:
    """Leave a note in the run folder when the run trains on the stand-in."""
    if Path(str(data)).parent != STANDIN_FOLDER.resolve():  # create_standin resolves links too
        return
    try:
        (save_dir / "TRAINED_ON_A_STAND_IN.txt").write_text(
            f"This run did not see coco8. The data set could not be downloaded, so yolo-flash trained on eight "
            f"pictures cut from the two photographs that the ultralytics package ships: {data}\n",
            encoding="utf-8",
        )
    except OSError as error:  # a full disk, say; the log has warned of the stand-in
        LOGGER.warning(f"yolo-flash: no note of the stand-in in the run folder: {error}")


def _is_shipped_coco8(name: str) -> bool:
    if name == "coco8" and not Path(name).exists():  # Ultralytics allows bare names
        name = "coco8.yaml"
    if Path(name).name != "coco8.yaml":
        return False
    found = check_file(name, hard=False, download=False)  # a coco8.yaml of the user's own comes first
    return bool(found) and Path(found).resolve() == (ROOT / "cfg" / "datasets" / "coco8.yaml").resolve()


def _coco8_on_disk() -> bool:
    """Whether Ultralytics would find the pictures; `check_det_dataset` looks in the working directory first."""
    folder = Path("coco8") if Path("coco8").exists() else Path(DATASETS_DIR) / "coco8"
    return (folder / "images" / "val").exists()
