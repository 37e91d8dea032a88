"""`yolo-flash convert`, and the offer of it wherever Ultralytics would fail with a checkpoint of YOLOv12's authors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints.forks import save, tiny_fork
from tests.cli.test_main import Yolo, refusal, yolo  # noqa: F401 - a fixture
from yolo_flash.cli import main
from yolo_flash.cli.arguments import UsageError
from yolo_flash.cli.commands import run_verify


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(tiny_fork(), tmp_path_factory.mktemp("forks") / "fork.pt").read_bytes()


@pytest.fixture
def fork(content: bytes, tmp_path: Path) -> Path:
    file = Path("fork.pt")
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("args", "file"),
    [
        ("", "fork-ultralytics.pt"),
        ("--to ultralytics", "fork-ultralytics.pt"),
        ("--out a=b.pt", "a=b.pt"),
        ("--out=new.pt --to=ultralytics", "new.pt"),
        ("out=new.pt to=ultralytics", "new.pt"),
    ],
)
def test_a_checkpoint_is_converted(args: str, file: str, fork: Path) -> None:
    main.main(["convert", "fork.pt", *args.split()])
    assert {path.name for path in Path().iterdir()} == {"fork.pt", file}


def test_there_and_back(fork: Path) -> None:
    fork.rename("lr=0.1.pt")
    main.main(["convert", "lr=0.1.pt"])
    main.main(["convert", "lr=0.1-ultralytics.pt", "--to", "authors"])
    assert Path("lr=0.1-ultralytics-authors.pt").is_file()


def test_mistakes_end_with_a_sentence(fork: Path) -> None:
    takes = "convert takes one checkpoint, --to authors|ultralytics and --out FILE.pt; found"
    assert refusal("convert") == f"{takes} nothing."
    assert refusal("convert", "fork.pt", "b.pt") == f"{takes} fork.pt, b.pt."
    assert refusal("convert", "--force") == f"{takes} --force."
    assert refusal("convert", "fork.pt", "--out") == f"{takes} fork.pt, --out."
    assert refusal("convert", "fork.pt", "--to", "onnx") == "convert: to=onnx is not one of ultralytics, authors."
    assert refusal("convert", "none.pt") == "convert: none.pt does not exist or is not a file."
    assert refusal("convert", "fork.pt", "--out", "fork.pt").startswith("convert: fork.pt exists and is left alone.")
    assert "nowhere" in refusal("convert", "fork.pt", "--out", "nowhere/new.pt")
    assert [path.name for path in Path().iterdir()] == ["fork.pt"]


OFFER = (
    " has the layout of YOLOv12's authors (attention with qk and v), which Ultralytics cannot run: type "
    "`yolo-flash convert fork.pt`, then use fork-ultralytics.pt instead."
)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ("train model=fork.pt data=coco8.yaml", "model=fork.pt"),
        ("train model=yolo12n.yaml pretrained=fork.pt", "pretrained=fork.pt"),
        ("train resume=fork.pt", "model=fork.pt"),
        ("val model=fork.pt", "model=fork.pt"),
        ("predict model=fork.pt source=x.jpg", "model=fork.pt"),
        ("export model=fork.pt", "model=fork.pt"),
        ("plan model=fork.pt", "model=fork.pt"),
        ("verify model=fork.pt", "model=fork.pt"),
        ("bench predict model=fork.pt", "model=fork.pt"),
    ],
)
def test_every_command_offers_to_convert(args: str, what: str, fork: Path, yolo: Yolo) -> None:  # noqa: F811
    assert refusal(*args.split()) == what + OFFER
    assert yolo.argv == []


def test_the_offer_can_be_pasted_and_names_what_is_there_already(fork: Path) -> None:
    Path("my runs").mkdir()
    fork.rename("my runs/fork.pt")
    with pytest.raises(UsageError, match=r"type `yolo-flash convert 'my runs/fork.pt'`"):
        run_verify(["model=my runs/fork.pt"])
    main.main(["convert", "my runs/fork.pt"])
    with pytest.raises(UsageError, match=r"cannot run: use my runs/fork-ultralytics.pt instead\."):
        run_verify(["model=my runs/fork.pt"])


def test_a_converted_checkpoint_is_used(fork: Path, yolo: Yolo) -> None:  # noqa: F811
    main.main(["convert", "fork.pt"])
    main.main(["predict", "model=fork-ultralytics.pt"])
    assert yolo.args == ["predict", "model=fork-ultralytics.pt"]
