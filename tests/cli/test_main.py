"""The command line: all of `yolo` passes through, our settings are taken out, and the process is left as it was."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ultralytics
from ultralytics import YOLO
from ultralytics.cfg import TASK2MODEL, TASKS
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import ASSETS, SETTINGS, YAML

import yolo_flash
from tests.versions import ULTRALYTICS
from yolo_flash.assets import offline
from yolo_flash.cli import main
from yolo_flash.config import FlashConfig, FlashConfigError

TRAIN = ["train", "model=yolo12n.yaml"]


@dataclass
class Yolo:
    """Stands in for Ultralytics' entry point: keeps what it would have seen, then does what the test asks.

    Attributes:
        argv: `sys.argv` of each call.
        cfg: The content of the `cfg=` file of each call that had one.
        action: Called within each call.
    """

    argv: list[list[str]] = field(default_factory=list)
    cfg: list[dict[str, Any]] = field(default_factory=list)
    action: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        self.argv.append(sys.argv[:])
        files = [arg.removeprefix("cfg=") for arg in sys.argv if arg.startswith("cfg=")]
        self.cfg += [YAML.load(file) for file in files if Path(file).is_file()]
        self.action()

    @property
    def args(self) -> list[str]:
        """The arguments of the only call."""
        assert len(self.argv) == 1
        return self.argv[0][1:]


@pytest.fixture
def yolo(monkeypatch: pytest.MonkeyPatch) -> Yolo:
    yolo = Yolo()
    monkeypatch.setattr("yolo_flash.cli.yolo.entrypoint", yolo)
    return yolo


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "can_download", lambda: True)


@pytest.fixture
def resolved(yolo: Yolo) -> Callable[..., FlashConfig]:
    """Run a command line and return the settings of the model that Ultralytics would have built."""

    def run(*args: str) -> FlashConfig:
        made: list[Any] = []
        yolo.action = lambda: made.append(ultralytics.YOLO("yolo12n.yaml"))
        main.main([*TRAIN, *args])
        (model,) = made
        config = model._flash_config
        assert isinstance(config, FlashConfig)
        return config

    return run


def refusal(*args: str) -> str:
    """The message with which the program ends."""
    with pytest.raises(SystemExit) as end:
        main.main(args)
    assert isinstance(end.value.code, str), "a message, hence exit status 1"
    assert end.value.code.startswith("yolo-flash: ")
    return end.value.code.removeprefix("yolo-flash: ")


def never() -> bool:
    raise AssertionError("probed the network without need")


# Help ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_alone_and_help_explain_in_one_screen_with_examples(
    args: list[str], yolo: Yolo, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(args)
    text = capsys.readouterr().out
    lines = text.strip().splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert version("yolo-flash") in lines[0]
    assert len(re.findall(r"^  yolo-flash (train|predict) \S+=", text, re.MULTILINE)) >= 3
    for key in (*FlashConfig.__dataclass_fields__, "config"):
        assert f"flash.{key}=" in text
    assert yolo.argv == []


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        ("help", ("torch", "ultralytics")),
        ("version", ("torch._dynamo", "yolo_flash.bench", "yolo_flash.engine", "yolo_flash.verification")),
        ("checks device=cpu", ("torch._dynamo", "yolo_flash.bench", "yolo_flash.engine", "yolo_flash.verification")),
    ],
)
def test_a_command_imports_only_what_it_needs(command: str, unneeded: tuple[str, ...]) -> None:
    code = "import sys; from yolo_flash.__main__ import main; main(); print('imported', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True)
    imported = done.stdout.split("imported ")[-1].split()
    assert "yolo_flash.cli.main" in imported
    assert not [name for name in imported if name.startswith(unneeded)]


def test_what_help_shows_can_be_pasted_into_a_shell() -> None:
    for line in main.HELP.splitlines():
        if "*" in line:  # zsh refuses an unquoted pattern that matches no file
            assert re.search(r"'[^']*\*[^']*'", line), line


def test_alone_means_the_arguments_of_the_process(
    yolo: Yolo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/yolo-flash"])
    main.main()
    assert "Examples" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["/usr/bin/yolo-flash", "cfg"])
    main.main()
    assert yolo.args == ["cfg"]


# Everything of yolo passes through -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        "train model=yolo12n.yaml data=coco8.yaml epochs=3 imgsz=640 lr0=1e-3",
        "detect train model=yolo12n.yaml",
        "train detect model=yolo12n.yaml resume=False",
        "mode=train task=detect model=yolo12n.yaml",
        "val model=my.pt data=coco8.yaml",
        "predict model=my.pt source=0 show save=False",
        "predict model=my.pt source=https://example.com/a.jpg?size=3&x=1",
        "export model=my.pt format=onnx half",
        "track model=my.pt source=clip.mp4 tracker=botsort.yaml",
        "benchmark model=my.pt imgsz=160",
        "train model=C:\\runs\\my.pt data=D:\\data\\my.yaml",
        "settings",
        "settings reset",
        "settings runs_dir=/data/runs",
        "cfg",
        "copy-cfg",
        "version",
        "--version",
        "solutions",
        "solutions help",
        "solutions count source=clip.mp4 show=True",
        "login KEY",
        "logout",
        "train --help",
        "predict help",
        "trian model=yolo12n.yaml",
        "train model=",
        "train=",
    ],
)
def test_a_command_line_reaches_ultralytics_unchanged(line: str, yolo: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "can_download", never)
    main.main(line.split())
    assert yolo.argv == [["yolo", *line.split()]]


@pytest.mark.parametrize(
    ("typed", "seen"),
    [
        (["project=my runs"], ["project=my runs"]),
        (["project='my runs'"], ["project='my runs'"]),
        (['name=a "b" c'], ['name=a "b" c']),
        (["source=a=b/c=d.jpg"], ["source=a=b/c=d.jpg"]),
        (["imgsz=[64,32]"], ["imgsz=[64,32]"]),
        (["imgsz=[64,", "32]"], ["imgsz=[64,32]"]),
        (["imgsz", "=", "64"], ["imgsz=64"]),
        (["imgsz=", "64"], ["imgsz=64"]),
        (["imgsz", "=64"], ["imgsz=64"]),
        (["imgsz = 64"], ["imgsz = 64"]),
        (["--imgsz=64", "epochs=1,"], ["--imgsz=64", "epochs=1,"]),
        (["name=flash.backend=stock"], ["name=flash.backend=stock"]),
    ],
)
def test_spaces_quotes_and_brackets_are_kept(typed: list[str], seen: list[str], yolo: Yolo) -> None:
    main.main([*TRAIN, *typed, "flash.log=false"])
    assert yolo.args == [*TRAIN, *seen]


def test_version_names_both_programs(yolo: Yolo, log: list[str]) -> None:
    main.main(["version"])
    assert log == [f"yolo-flash {version('yolo-flash')}, ultralytics:"]


@pytest.mark.skipif(ULTRALYTICS < (8, 4, 175), reason="Ultralytics tells it from 8.4.175 on")
def test_an_unmatched_bracket_is_told(yolo: Yolo) -> None:
    assert refusal(*TRAIN, "imgsz=[64") == "'imgsz=[64' has an unmatched '[' or ']' bracket."
    assert yolo.argv == []


# flash.* settings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "typed",
    [
        ["flash.backend=sdpa_math"],
        ["--flash.backend=sdpa_math"],
        ["-flash.backend=sdpa_math"],
        ["flash.backend", "=", "sdpa_math"],
        ["flash.backend=", "sdpa_math"],
        ["flash.backend = sdpa_math"],
        ["flash.backend='sdpa_math'"],
        ["flash.backend=sdpa_math,"],
        ["flash.backend=stock", "flash.backend=sdpa_math"],
    ],
)
def test_a_setting_is_taken_out_wherever_and_however_it_is_typed(
    typed: list[str], yolo: Yolo, resolved: Callable[..., FlashConfig]
) -> None:
    assert resolved(*typed, "epochs=1").backend == "sdpa_math"
    assert yolo.args == [*TRAIN, "epochs=1"]


def test_a_setting_may_come_first(yolo: Yolo) -> None:
    main.main(["flash.backend=stock", *TRAIN])
    assert yolo.args == TRAIN


@pytest.mark.parametrize(
    "typed",
    ["model.6.*:stock,model.8.*:sdpa_math", "{'model.6.*': 'stock', 'model.8.*': 'sdpa_math'}"],
)
def test_layers_in_a_shell_and_as_a_dict(typed: str, resolved: Callable[..., FlashConfig]) -> None:
    assert resolved(f"flash.layers={typed}").layers == {"model.6.*": "stock", "model.8.*": "sdpa_math"}


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("flash.backnd=stock", "the command line: there is no setting 'backnd'. Did you mean 'backend'?"),
        ("flash.enabled=ture", "enabled must be true or false, found 'ture'"),
        ("flash.deterministic=stric", "Did you mean 'strict'?"),
        ("flash.backend=sdpa_flsh", "there is no backend 'sdpa_flsh'. Did you mean 'sdpa_flash'?"),
        ("flash.layers=model.6.*:sdpa_flsh", "there is no backend 'sdpa_flsh'. Did you mean 'sdpa_flash'?"),
        ("flash.layers=model.6", "layers must map layer patterns to backend names"),
        ("flash.config=strikt", "flash.config=strikt: no such file, and not a shipped one. Did you mean 'strict'?"),
        ("flash.backend=", "flash.backend= needs a value: flash.backend=..."),
        ("flash.log", "flash.log needs a value: flash.log=..."),
        ("flash.", "flash. needs a value: flash.backend=..."),
        ("flash=false", "flash=false does not name a setting: flash.enabled=..."),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(arg: str, told: str, yolo: Yolo) -> None:
    assert told in refusal(*TRAIN, arg)
    assert yolo.argv == []


def test_a_pattern_that_matches_no_layer_is_told_with_the_layers_that_there_are() -> None:
    told = refusal(*TRAIN, "flash.layers=model.99.*:stock")
    assert told.startswith("flash.layers: 'model.99.*' matches no attention layer. This model has model.6.")


def test_the_six_sources_meet_on_the_command_line(
    resolved: Callable[..., FlashConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file.yaml").write_text("backend: stock\nlog: false\ndeterministic: strict\nlayers: {model.6.*: stock}\n")
    Path("cfg.yaml").write_text("epochs: 1\nflash: {backend: sdpa_math, log: true, deterministic: prefer}\n")
    monkeypatch.setenv("YOLO_FLASH_BACKEND", "sdpa_efficient")
    monkeypatch.setenv("YOLO_FLASH_LOG", "0")
    assert resolved("flash.config=file.yaml", "cfg=cfg.yaml", "flash.backend=sdpa_flash") == FlashConfig(
        backend="sdpa_flash", log=False, deterministic="prefer", layers={"model.6.*": "stock"}
    )


def test_the_switch_of_the_environment_wins_over_an_explicit_setting(
    resolved: Callable[..., FlashConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_FLASH", "0")
    assert resolved("flash.enabled=true").enabled is False


# cfg= files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("typed", [["cfg=my.yaml"], ["cfg", "=", "my.yaml"], ["--cfg=my.yaml"], ["cfg = my.yaml"]])
def test_the_flash_section_of_a_cfg_file_is_ours_and_the_rest_is_ultralytics(
    typed: list[str], yolo: Yolo, resolved: Callable[..., FlashConfig]
) -> None:
    Path("my.yaml").write_text("epochs: 2\nproject: my runs\nflash:\n  backend: stock\n")
    assert resolved(*typed, "imgsz=64").backend == "stock"
    assert yolo.cfg == [{"epochs": 2, "project": "my runs"}]
    model, cfg, rest = yolo.args[1:]
    assert (model, rest) == ("model=yolo12n.yaml", "imgsz=64")
    copy = Path(cfg.removeprefix("cfg="))
    assert copy.name == "my.yaml"
    assert not copy.parent.exists(), "the temporary copy is removed"
    assert YAML.load("my.yaml")["flash"] == {"backend": "stock"}, "the user's file is left alone"


def test_the_temporary_copy_is_removed_after_an_exception_too(yolo: Yolo) -> None:
    Path("my.yaml").write_text("flash: {log: false}\n")
    yolo.action = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        main.main([*TRAIN, "cfg=my.yaml"])
    assert not Path(yolo.args[-1].removeprefix("cfg=")).parent.exists()


def test_a_cfg_file_without_a_section_is_passed_on_itself(yolo: Yolo) -> None:
    Path("my.yaml").write_text("epochs: 2\n")
    main.main([*TRAIN, "cfg=my.yaml"])
    assert yolo.args == [*TRAIN, "cfg=my.yaml"]


def test_an_empty_section_sets_nothing_and_is_stripped(yolo: Yolo, resolved: Callable[..., FlashConfig]) -> None:
    Path("my.yaml").write_text("epochs: 2\nflash:\n")
    assert resolved("cfg=my.yaml") == FlashConfig()
    assert yolo.cfg == [{"epochs": 2}]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("missing.yaml", None, "cfg=missing.yaml: 'missing.yaml' does not exist"),
        ("my.txt", "epochs: 2", "cfg=my.txt: it must be a YAML file, with the suffix .yaml or .yml."),
        ("my.yaml", "[1, 2", "cfg=my.yaml: YAML syntax error"),
        ("my.yaml", "flash: false", "the flash: section must map keys to values, found False"),
        ("my.yaml", "flash: {backnd: stock}", "the flash: section: there is no setting 'backnd'. Did you mean"),
    ],
)
def test_a_cfg_file_that_cannot_be_used_is_told(file: str, text: str | None, told: str, yolo: Yolo) -> None:
    if text is not None:
        Path(file).write_text(text)
    assert refusal(*TRAIN, f"cfg={file}").startswith(told)
    assert yolo.argv == []


def test_no_cfg_file_may_be_said_in_words(yolo: Yolo) -> None:
    main.main([*TRAIN, "cfg=None"])
    assert yolo.args == [*TRAIN, "cfg=None"]


# The model -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        "train",
        "detect train",
        "mode=train data=coco8.yaml",
        "train model=None",
        "train resume=False",
        "--mode=train",
        "train,",
        "data=coco8.yaml",  # Ultralytics' default mode is train
        "train cfg=default_copy.yaml",
        "cfg=default_copy.yaml",
    ],
)
def test_train_without_a_model_takes_yolo12n_and_says_so(line: str, yolo: Yolo, online: None, log: list[str]) -> None:
    Path("default_copy.yaml").write_text("mode: train\ntask: detect\nmodel:\nresume: False\n")  # as of `copy-cfg`
    main.main(line.split())
    assert yolo.args == [*line.split(), "model=yolo12n.pt"]
    assert log == ["yolo-flash: no model= given: training from yolo12n.pt"]


def test_train_without_a_model_and_without_a_network_starts_from_scratch(yolo: Yolo, log: list[str]) -> None:
    main.main(["train"])
    assert yolo.args == ["train", "model=yolo12n.yaml"]
    assert log == ["yolo-flash: no model= given and nothing can be downloaded: training yolo12n.yaml from scratch"]


@pytest.mark.parametrize("folder", [".", "weights_dir"])
def test_train_without_a_model_takes_weights_that_are_on_disk(
    folder: str, yolo: Yolo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(offline, "can_download", never)
    monkeypatch.setattr(offline, "SETTINGS", {**SETTINGS, "weights_dir": str(tmp_path / "weights_dir")})
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "yolo12n.pt").touch()
    main.main(["train"])
    assert yolo.args == ["train", "model=yolo12n.pt"]


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_a_model_with_and_without_a_network(
    task: str, yolo: Yolo, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.main([task, "train"])
    monkeypatch.setattr(offline, "can_download", lambda: True)
    main.main(["train", f"task={task}"])
    scratch, weights = (argv[-1].removeprefix("model=") for argv in yolo.argv)
    assert yaml_model_load(scratch)["scale"] == "n"
    assert weights == ("yolo12n.pt" if task == "detect" else TASK2MODEL[task])
    assert Path(weights).stem == Path(scratch).stem


@pytest.mark.parametrize("typed", ["model = yolov8n.yaml", "--model=yolov8n.yaml", "model=yolov8n.yaml,"])
def test_a_model_that_was_named_in_any_spelling_is_kept(typed: str, yolo: Yolo) -> None:
    main.main(["train", typed])
    assert yolo.args == ["train", typed]


def test_a_model_that_a_cfg_file_names_is_kept(yolo: Yolo) -> None:
    Path("my.yaml").write_text("model: yolov8n.yaml\nflash: {log: false}\n")
    main.main(["train", "cfg=my.yaml"])
    assert len(yolo.args) == 2
    assert yolo.cfg == [{"model": "yolov8n.yaml"}]


def test_arguments_win_over_the_cfg_file(yolo: Yolo, online: None) -> None:
    Path("my.yaml").write_text("mode: train\ntask: segment\n")
    main.main(["cfg=my.yaml", "task=pose"])
    main.main(["cfg=my.yaml", "mode=val"])
    assert [argv[1:] for argv in yolo.argv] == [
        ["cfg=my.yaml", "task=pose", "model=yolo26n-pose.pt"],
        ["cfg=my.yaml", "mode=val"],
    ]


def test_a_checkpoint_to_resume_is_the_model(yolo: Yolo) -> None:
    main.main(["train", "resume=runs/my run/last.pt"])
    assert yolo.args == ["train", "resume=runs/my run/last.pt", "model=runs/my run/last.pt"]


def test_a_checkpoint_to_resume_may_stand_in_a_cfg_file(yolo: Yolo) -> None:
    Path("my.yaml").write_text("resume: runs/last.pt\n")
    main.main(["train", "cfg=my.yaml"])
    assert yolo.args == ["train", "cfg=my.yaml", "model=runs/last.pt"]


@pytest.mark.parametrize("resume", ["resume", "resume=True", "resume=runs/train"])
def test_resume_without_a_checkpoint_is_left_to_ultralytics(resume: str, yolo: Yolo, online: None) -> None:
    main.main(["train", resume])
    assert yolo.args == ["train", resume]


def test_resume_with_a_model_is_left_to_ultralytics(yolo: Yolo) -> None:
    main.main(["train", "resume", "model=runs/last.pt"])
    assert yolo.args == ["train", "resume", "model=runs/last.pt"]


@pytest.mark.parametrize("mode", ["val", "predict", "export", "track", "benchmark"])
def test_other_modes_keep_the_default_of_ultralytics(mode: str, yolo: Yolo, online: None) -> None:
    main.main([mode])
    assert yolo.args == [mode]


def test_resume_without_a_run_asks_for_one() -> None:
    with pytest.raises(SystemExit, match=r"resume needs the run to resume: model=path/to/last\.pt"):
        main.main(["train", "resume"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train model=yolo12n.pt", "model=yolo12n.pt"),
        ("train model=yolo12n", "model=yolo12n"),
        ("train model=weights/yolo12n.pt", "model=weights/yolo12n.pt"),
        ("train model='yolo12n.pt'", "model=yolo12n.pt"),
        ("train model=yolov5n.pt", "model=yolov5n.pt"),
        ("val model=yolo26x-seg.pt", "model=yolo26x-seg.pt"),
        ("train resume=yolo12n.pt", "model=yolo12n.pt"),
        ("train model=yolo12n.yaml pretrained=yolo12n.pt", "pretrained=yolo12n.pt"),
        ("predict", "no model= given: yolo26n.pt, which Ultralytics takes,"),
        ("segment predict", "no model= given: yolo26n-seg.pt, which Ultralytics takes,"),
        ("solutions count model=yolo26n.pt", "model=yolo26n.pt"),
        ("train cfg=my.yaml", "model=yolo11n.pt"),
    ],
)
def test_weights_that_cannot_be_had_are_told_at_once(line: str, told: str, yolo: Yolo) -> None:
    Path("my.yaml").write_text("model: yolo11n.pt\n")
    message = refusal(*line.split())
    assert message.startswith(f"{told} is not on this machine and cannot be downloaded: YOLO_OFFLINE is set. Copy")
    assert ("train from scratch with model=yolo" in message) == ("train" in line.split())
    assert yolo.argv == []


def test_the_refusal_names_the_host_and_the_seconds(yolo: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOLO_OFFLINE")
    monkeypatch.setattr(offline, "can_download", lambda: False)
    assert "github.com did not answer within 3 s" in refusal("val", "model=yolo12n.pt")


@pytest.mark.parametrize(
    "model", ["yolo12n.yaml", "my.pt", "best.onnx", "http://server/yolo12n.pt", "ul://a/b/yolo12n"]
)
def test_only_weights_of_the_download_host_are_probed_for(
    model: str, yolo: Yolo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "can_download", never)
    main.main(["val", f"model={model}"])
    assert yolo.args == ["val", f"model={model}"]


# The process is left as it was ---------------------------------------------------------------------------------------
def snapshot() -> tuple[Any, ...]:
    return sys.argv, sys.argv[:], {k: v for k, v in vars(ultralytics).items() if k in ultralytics.MODELS}


@pytest.mark.parametrize("end", ["return", "exception", "exit"])
@pytest.mark.parametrize("bound", [False, True])
def test_everything_global_is_restored(end: str, bound: bool, yolo: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    if bound:  # a user's own class under the name
        monkeypatch.setitem(vars(ultralytics), "YOLO", type("Own", (), {}))
    ends = {"return": None, "exception": RuntimeError("out of memory"), "exit": SystemExit(3)}
    error = ends[end]

    def action() -> None:
        assert ultralytics.YOLO is not before[2].get("YOLO", YOLO)
        if error is not None:
            raise error

    before = snapshot()
    yolo.action = action
    if error is None:
        main.main(TRAIN)
    else:
        with pytest.raises(type(error)) as raised:
            main.main(TRAIN)
        assert raised.value is error, "errors of Ultralytics stay as they are"
    after = snapshot()
    assert after[0] is before[0]
    assert after[1:] == before[1:]


def test_the_program_is_called_yolo_in_every_list_that_ultralytics_reads(
    yolo: Yolo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(sys, "argv", ["a", "new", "list"])  # the modules of Ultralytics still have the old one
    old = ultralytics.cfg.ARGV[:]
    yolo.action = lambda: seen.extend([ultralytics.cfg.ARGV[:], ultralytics.engine.model.ARGV[:]])
    main.main(TRAIN)
    assert seen == [["yolo", *TRAIN]] * 2
    assert sys.argv == ["a", "new", "list"]
    assert old == ultralytics.cfg.ARGV


def test_only_the_first_model_is_patched(yolo: Yolo) -> None:
    made: list[Any] = []
    yolo.action = lambda: made.extend([ultralytics.YOLO("yolo12n.yaml"), ultralytics.YOLO("yolo12n.yaml")])
    main.main(TRAIN)
    assert [type(model).__name__ for model in made] == ["FlashYOLO", "YOLO"]
    assert [isinstance(model, YOLO) for model in made] == [True, True]


@pytest.mark.parametrize("name", ["YOLO", "RTDETR"])
def test_both_classes_make_patched_objects_and_get_all_arguments(
    name: str, yolo: Yolo, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setitem(vars(ultralytics), name, lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setattr(
        "yolo_flash.engine.model.patch_from_sources",
        lambda model, sources: SimpleNamespace(model=model, **sources),
    )
    yolo.action = lambda: made.append(getattr(ultralytics, name)("a.pt", task="detect"))
    main.main([*TRAIN, "flash.log=false"])
    assert made == [SimpleNamespace(model=(("a.pt",), {"task": "detect"}), cli={"log": False}, section=None)]


def test_a_solution_gets_a_patched_model_and_its_module_the_class_back(yolo: Yolo) -> None:
    from ultralytics.solutions import solutions

    made: list[Any] = []
    yolo.action = lambda: made.append(solutions.YOLO("yolo12n.yaml"))
    main.main(["solutions", "count"])
    assert type(made[0]).__name__ == "FlashYOLO"
    assert solutions.YOLO is YOLO


def test_errors_of_the_settings_inside_ultralytics_end_the_program_with_their_message(yolo: Yolo) -> None:
    def action() -> None:
        raise FlashConfigError("nothing matches")

    yolo.action = action
    assert refusal(*TRAIN) == "nothing matches"


# Real runs -----------------------------------------------------------------------------------------------------------
def test_a_real_training_run_with_a_section_and_a_space_in_its_folder(
    tiny_args: dict[str, Any], tmp_path: Path, log: list[str]
) -> None:
    before = snapshot()
    YAML.save("my.yaml", {**tiny_args, "project": "", "flash": {"backend": "sdpa_math"}})
    main.main(["train", "cfg", "=", "my.yaml", "model=yolo12n.yaml", f"project={tmp_path / 'my runs'}"])
    run = tmp_path / "my runs" / "train"
    assert (run / "weights" / "best.pt").is_file()
    assert not list(run.glob("TRAINED_ON_A_STAND_IN*")), "data= named the set itself"
    assert re.search(r"train .*sdpa_math +asked for", "\n".join(log))
    assert snapshot() == before


def test_a_real_prediction_is_saved(tmp_path: Path) -> None:
    project = f"project={tmp_path / 'runs'}"
    main.main(["predict", "model=yolo12n.yaml", f"source={ASSETS / 'bus.jpg'}", "imgsz=32", "device=cpu", project])
    assert (tmp_path / "runs" / "predict" / "bus.jpg").is_file()


def test_python_m_runs_the_same_program(yolo: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/yolo_flash/__main__.py", "settings"])
    runpy.run_module("yolo_flash", run_name="__main__")
    assert yolo.argv == [["yolo", "settings"]]


# Without a traceback --------------------------------------------------------------------------------------------------
def test_graphs_that_were_asked_for_and_cannot_run_are_told(tiny_model: str, tiny_args: dict[str, Any]) -> None:
    typed = [f"{key}={value}" for key, value in tiny_args.items()]
    told = refusal("train", f"model={tiny_model}", *typed, "flash.graphs=on")
    assert told.startswith("flash.graphs=on cannot run: needs an NVIDIA GPU")
    assert issubclass(yolo_flash.FlashGraphError, Exception)


def test_nothing_leans_on_assertions(tmp_path: Path, log: list[str]) -> None:
    (tmp_path / "my.txt").write_text("epochs: 1")
    plan, wrong = ["plan", "imgsz=64", "batch=2", "device=cpu", "flash.autotune=false"], ["train", "cfg=my.txt"]
    main.main(plan)
    told = refusal(*wrong)
    code = f"from yolo_flash.cli.main import main; main({plan}); main({wrong})"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "\n".join(log) in done.stdout
    assert done.stderr == f"yolo-flash: {told}\n"


def test_there_is_no_assertion_that_python_would_drop() -> None:
    for file in Path(main.__file__).parents[1].rglob("*.py"):
        assert not re.search(r"^\s*assert ", file.read_text(encoding="utf-8"), re.MULTILINE), file
