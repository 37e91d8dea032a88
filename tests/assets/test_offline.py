"""Without a network: a short probe, refusals at once, and a stand-in for coco8 and for nothing else."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ultralytics.data import utils as data_utils
from ultralytics.utils import ROOT, SETTINGS, YAML, downloads

from yolo_flash.assets import offline
from yolo_flash.assets.coco8_standin import create_standin
from yolo_flash.cli import main

SHIPPED = ROOT / "cfg" / "datasets" / "coco8.yaml"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets, weights and the stand-in in a folder beside the working directory, none of which exists yet."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(offline, "DATASETS_DIR", home / "datasets")
    monkeypatch.setattr(data_utils, "DATASETS_DIR", home / "datasets")
    monkeypatch.setattr(offline, "STANDIN_FOLDER", home / "coco8-stand-in")
    monkeypatch.setattr(offline, "SETTINGS", {**SETTINGS, "weights_dir": str(home / "weights")})
    monkeypatch.delenv("YOLO_FLASH_DATASETS", raising=False)
    return home


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int]]]:
    """Lift YOLO_OFFLINE and every proxy, then replace the connection; returns the addresses that were tried."""

    def replace(action: Callable[[], object] = lambda: None) -> list[tuple[str, int]]:
        monkeypatch.delenv("YOLO_OFFLINE", raising=False)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        tried: list[tuple[str, int]] = []
        peers: list[socket.socket] = []

        def connect(address: tuple[str, int], timeout: float) -> socket.socket:
            tried.append(address)
            action()
            ours, theirs = socket.socketpair()
            theirs.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")  # a proxy's yes
            peers.append(theirs)
            return ours

        monkeypatch.setattr(socket, "create_connection", connect)
        return tried

    return replace


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> bool:
        raise AssertionError("probed the network without need")

    monkeypatch.setattr(offline, "can_download", probe)


def fail(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# The probe -----------------------------------------------------------------------------------------------------------
def test_the_probe_connects_to_the_download_host(network: Callable[..., list[tuple[str, int]]]) -> None:
    tried = network()
    assert offline.can_download() is True
    assert tried == [("github.com", 443)]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        socket.gaierror(-3, "Temporary failure in name resolution"),
        OSError(101, "Network is unreachable"),
        UnicodeError("label too long"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_connection_is_a_no(error: Exception, network: Callable[..., list[tuple[str, int]]]) -> None:
    tried = network(fail(error))
    assert offline.can_download() is False
    assert len(tried) == 1


def test_a_name_look_up_that_hangs_is_a_no_in_time_and_does_not_keep_the_process(
    network: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(offline, "PROBE_SECONDS", 0.2)
    network(lambda: answer.wait(20))
    others = set(threading.enumerate())
    start = time.monotonic()
    try:
        assert offline.can_download() is False
        assert 0.2 <= time.monotonic() - start < 2
        (hanging,) = set(threading.enumerate()) - others
        assert hanging.daemon, "the interpreter waits at its end for all threads but daemons"
    finally:
        answer.set()


def test_the_probe_waits_three_seconds() -> None:
    assert offline.PROBE_SECONDS == 3


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on"])
def test_yolo_offline_says_no_without_a_connection(
    value: str, network: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = network()
    monkeypatch.setenv("YOLO_OFFLINE", value)
    assert offline.can_download() is False
    assert tried == []
    assert offline.why_not() == "YOLO_OFFLINE is set"


@pytest.mark.parametrize("value", ["false", "0", ""])
def test_yolo_offline_may_be_off(
    value: str, network: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network()
    monkeypatch.setenv("YOLO_OFFLINE", value)
    assert offline.can_download() is True
    assert offline.why_not() == "github.com did not answer within 3 s"


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        ({"HTTPS_PROXY": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        ({"https_proxy": "http://user:secret@proxy.example:3128/"}, ("proxy.example", 3128)),
        ({"https_proxy": "proxy.example:3128"}, ("proxy.example", 3128)),
        ({"https_proxy": "http://proxy.example"}, ("proxy.example", 80)),
        ({"https_proxy": "https://proxy.example"}, ("proxy.example", 443)),
        ({"all_proxy": "socks5://proxy.example"}, ("proxy.example", 1080)),
        ({"https_proxy": "http://proxy.example:1", "no_proxy": "github.com"}, ("github.com", 443)),
        ({"https_proxy": "http://proxy.example:1", "no_proxy": "localhost"}, ("proxy.example", 1)),
        ({"http_proxy": "http://proxy.example:1"}, ("github.com", 443)),
        ({"https_proxy": ""}, ("github.com", 443)),
    ],
)
def test_the_probe_takes_the_way_of_the_download(
    environment: dict[str, str],
    address: tuple[str, int],
    network: Callable[..., list[tuple[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = network()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert offline.can_download() is True
    assert tried == [address]


def test_a_proxy_that_is_no_address_is_a_no(
    network: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = network()
    monkeypatch.setenv("https_proxy", "http://proxy.example:many")
    assert offline.can_download() is False
    assert tried == []


@contextlib.contextmanager
def proxy(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy on a port of its own that gives every request the same answer; yields the port and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        requests.append(connection.recv(1024))
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], requests
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        (b"HTTP/1.1 200 Connection established\r\n\r\n", True),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", False),  # only package registries are let through
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", False),
        (b"", False),
    ],
)
def test_a_proxy_has_to_let_the_download_host_through(
    answer: bytes, yes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YOLO_OFFLINE")
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with proxy(answer) as (port, requests):
        monkeypatch.setenv("https_proxy", f"http://user:se%40cret@127.0.0.1:{port}")
        assert offline.can_download() is yes
        assert requests[0].startswith(b"CONNECT github.com:443 HTTP/1.1\r\n")
        assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:se@cret") in requests[0]
    assert offline.can_download() is False  # the proxy is gone


def test_downloads_are_off_for_the_time_of_overlapping_trainings() -> None:
    original = downloads.safe_download
    first, second = offline.no_downloads(), offline.no_downloads()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ConnectionError):
        downloads.safe_download("https://example.com/file")
    second.__exit__(None, None, None)
    assert downloads.safe_download is original


# Weights -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "weights", ["yolo12n.pt", Path("yolo12n.pt"), "folder/yolo12n.pt", "yolov5n.pt", "yolov5nu.pt", "rtdetr-l.pt"]
)
def test_official_weights_that_are_not_on_disk_are_missing(weights: str | Path) -> None:
    assert offline.missing_asset(weights) is True


@pytest.mark.parametrize(
    "weights", ["yolo12n.yaml", "best.pt", "", "https://example.com/yolo12n.pt", "ul://user/project/yolo12n.pt"]
)
def test_what_does_not_come_from_the_download_host_is_not_missing(weights: str) -> None:
    assert offline.missing_asset(weights) is False


@pytest.mark.parametrize(
    ("folder", "name"), [(".", "yolo12n.pt"), ("../home/weights", "yolo12n.pt"), ("a", "a/yolo12n.pt")]
)
def test_official_weights_on_disk_are_not_missing(folder: str, name: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "yolo12n.pt").touch()
    assert offline.missing_asset(name) is False


def test_missing_weights_end_the_program_at_once_with_what_to_do(
    network: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PROBE_SECONDS", 0.2)
    answer = threading.Event()
    tried = network(lambda: answer.wait(20))
    start = time.monotonic()
    try:
        with pytest.raises(SystemExit) as end:
            main.main(["train", "model=yolo12n.pt", "data=coco8.yaml"])
    finally:
        answer.set()
    assert time.monotonic() - start < 2
    assert len(tried) == 1
    assert str(end.value.code) == (
        "yolo-flash: model=yolo12n.pt is not on this machine and cannot be downloaded: github.com did not answer "
        "within 0.2 s. Copy the file here, or train from scratch with model=yolo12n.yaml."
    )


def test_downloads_fail_at_once_within_the_context_and_work_after_it() -> None:
    original = downloads.safe_download
    with (
        pytest.raises(ConnectionError, match=r"yolo12n\.pt not downloaded: YOLO_OFFLINE is set"),
        offline.no_downloads(),
    ):
        downloads.attempt_download_asset("yolo12n.pt")
    assert downloads.safe_download is original


# Data sets -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["coco8.yaml", "coco8", str(SHIPPED), SHIPPED])
def test_coco8_without_a_network_is_a_stand_in_with_a_loud_warning(
    name: str | Path, folders: Path, log: list[str]
) -> None:
    assert offline.data_within_reach(name) == str(folders / "coco8-stand-in" / "data.yaml")
    (warning,) = log
    assert "A STAND-IN TAKES ITS PLACE" in warning
    assert str(folders / "coco8-stand-in") in warning, "names the stand-in"
    assert f"connect to the network once, or unpack coco8.zip into {folders / 'datasets'}" in warning
    assert "YOLO_OFFLINE is set" in warning, "says why"
    assert not (folders / "datasets").exists(), "never writes where the real set belongs"


def test_coco8_with_a_network_is_left_to_ultralytics(monkeypatch: pytest.MonkeyPatch, folders: Path) -> None:
    monkeypatch.setattr(offline, "can_download", lambda: True)
    assert offline.data_within_reach("coco8.yaml") == "coco8.yaml"
    assert not folders.exists()


@pytest.mark.parametrize("place", ["datasets", "../work"])
def test_coco8_on_disk_is_used_without_a_probe(place: str, folders: Path, no_probe: None) -> None:
    (folders / "datasets").mkdir(parents=True)
    (folders / place / "coco8" / "images" / "val").mkdir(parents=True)
    assert offline.data_within_reach("coco8.yaml") == "coco8.yaml"


@pytest.mark.parametrize(
    "data",
    [
        "coco9.yaml",
        "coco8.yml",
        "coco8-seg.yaml",
        "coco128.yaml",
        "coco.yaml",
        "typo/coco8.yaml",
        "/nowhere/coco8.yaml",
        "https://example.com/coco8.yaml",
        "coco8.zip",
        "",
        None,
        {"train": "images"},
        ["coco8.yaml", "coco128.yaml"],
    ],
)
def test_any_other_data_set_and_a_typo_stay_with_ultralytics(data: Any, no_probe: None, folders: Path) -> None:
    assert offline.data_within_reach(data) == data
    assert not folders.exists()


@pytest.mark.parametrize("name", ["coco8.yaml", "mine/coco8.yaml"])
def test_a_coco8_yaml_of_the_user_wins(name: str, no_probe: None) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    YAML.save(name, {"path": "elsewhere", "train": "a", "val": "b", "names": ["x"]})
    assert offline.data_within_reach(name) == name
    assert offline.data_within_reach(str(Path(name).resolve())) == str(Path(name).resolve())


def test_a_folder_of_the_user_called_coco8_wins(no_probe: None) -> None:
    Path("coco8").mkdir()
    assert offline.data_within_reach("coco8") == "coco8"


# YOLO_FLASH_DATASETS -------------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets that has coco8 and pets, named in the environment."""
    folder = tmp_path / "data sets"
    for name in ("coco8", "pets"):
        (folder / name).mkdir(parents=True)
        (folder / name / "data.yaml").touch()
    monkeypatch.setenv("YOLO_FLASH_DATASETS", str(folder))
    return folder


@pytest.mark.parametrize(("data", "name"), [("coco8.yaml", "coco8"), ("coco8", "coco8"), ("pets.yaml", "pets")])
def test_a_set_in_the_folder_of_data_sets_is_used_and_told(
    data: str, name: str, datasets: Path, no_probe: None, log: list[str]
) -> None:
    local = str(datasets / name / "data.yaml")
    assert offline.data_within_reach(data) == local
    assert log == [f"yolo-flash: data={data} is read from {local} (YOLO_FLASH_DATASETS)"]


@pytest.mark.parametrize("data", ["dogs.yaml", "mine/pets.yaml", "/mine/pets.yaml"])
def test_other_sets_do_not_come_from_the_folder(data: str, datasets: Path, no_probe: None) -> None:
    assert offline.data_within_reach(data) == data


def test_a_file_in_the_working_directory_wins_over_the_folder(datasets: Path, no_probe: None) -> None:
    Path("pets.yaml").touch()
    assert offline.data_within_reach("pets.yaml") == "pets.yaml"


def test_without_coco8_in_the_folder_the_stand_in_stays(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_FLASH_DATASETS", str(tmp_path))
    assert offline.data_within_reach("coco8.yaml") == str(folders / "coco8-stand-in" / "data.yaml")


# The record in the run folder ----------------------------------------------------------------------------------------
def test_only_a_run_on_the_stand_in_is_noted(folders: Path, tmp_path: Path, coco8: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for data in (coco8, "coco8.yaml", str(SHIPPED), None):
        offline.note_standin(data, run)
    assert not list(run.iterdir())
    yaml = create_standin(folders / "coco8-stand-in")
    offline.note_standin(str(yaml), run)
    (note,) = run.iterdir()
    assert note.name == "TRAINED_ON_A_STAND_IN.txt"
    assert "This run did not see coco8" in note.read_text(encoding="utf-8")
    assert str(yaml) in note.read_text(encoding="utf-8")


def test_a_run_is_noted_behind_a_linked_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    try:
        link.symlink_to(real, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    monkeypatch.setattr(offline, "STANDIN_FOLDER", link / "coco8-stand-in")
    offline.note_standin(offline.data_within_reach("coco8.yaml"), tmp_path)
    assert (tmp_path / "TRAINED_ON_A_STAND_IN.txt").is_file()


def test_a_validation_takes_the_stand_in_too(folders: Path, tiny_model: str, log: list[str]) -> None:
    main.main(["val", f"model={tiny_model}", "data=coco8.yaml", "imgsz=32", "batch=2", "device=cpu", "plots=false"])
    assert sum("A STAND-IN TAKES ITS PLACE" in message for message in log) == 1
    assert not (folders / "datasets").exists()


def test_a_real_run_on_the_stand_in(folders: Path, tiny_args: dict[str, Any], tmp_path: Path, log: list[str]) -> None:
    args = {**tiny_args, "data": "coco8.yaml", "val": False}
    main.main(["train", *(f"{key}={value}" for key, value in args.items())])
    run = tmp_path / "runs" / "train"
    assert (run / "TRAINED_ON_A_STAND_IN.txt").is_file()
    assert YAML.load(run / "args.yaml")["model"] == "yolo12n.yaml"
    assert sum("A STAND-IN TAKES ITS PLACE" in message for message in log) == 1
    assert any("training yolo12n.yaml from scratch" in message for message in log)
    assert not (folders / "datasets").exists()
