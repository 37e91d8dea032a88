"""Reading a checkpoint runs nothing of it: what it names is on a list, or it is refused by that name."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.modules.block import TorchVision
from ultralytics.nn.tasks import DetectionModel

from tests.checkpoints.forks import save, tiny_fork
from yolo_flash import CheckpointError
from yolo_flash.checkpoints import reading
from yolo_flash.checkpoints.reading import globals_in, names_authors_layout, read_checkpoint

RAN: list[Any] = []


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def ran(*args: Any) -> None:
    RAN.append(args)


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    RAN.clear()
    yield
    assert RAN == []


def archive(data: bytes) -> bytes:
    """What torch.save would write around a pickle."""
    content = io.BytesIO()
    torch.save({}, content)
    new = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(new, "w") as file:
        for name in old.namelist():
            file.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return new.getvalue()


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(content, "fork.pt")
    return str(error.value)


def saved(thing: Any) -> bytes:
    content = io.BytesIO()
    torch.save(thing, content)
    return content.getvalue()


# What is named -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", range(6))
def test_names_are_read_in_every_protocol(protocol: int) -> None:
    things = [os.system, os.path.join, os.system, DetectionModel, nn.Conv2d, ran, RAN, "torch", "Size"]
    found = globals_in(pickle.dumps(things, protocol))
    expected = {
        (thing.__module__, thing.__name__) for thing in (os.system, os.path.join, DetectionModel, nn.Conv2d, ran)
    }
    assert found == expected


def test_names_that_hide_behind_others_are_not_taken_for_them() -> None:
    texts = [b"\x8c" + bytes([len(text)]) + text for text in (b"os", b"system", b"torch", b"Size")]
    popped = b"\x80\x04" + b"".join(texts) + b"00" + b"\x93."
    assert globals_in(popped) == {("a name", "that is computed")}
    copied = b"\x80\x04" + texts[0] + texts[1] + b"\x93" + b"2" + b"\x93."
    assert ("a name", "that is computed") in globals_in(copied)
    memoised = b"\x80\x04" + texts[0] + b"\x94" + texts[1] + b"\x94" + b"00" + b"h\x00h\x01\x93."
    assert globals_in(memoised) == {("os", "system")}
    assert "os.system" in refusal(archive(memoised))
    assert "a name.that is computed" in refusal(archive(popped))


def test_extensions_and_old_instances_are_named() -> None:
    assert globals_in(b"\x80\x02\x82\x07.") == {("copyreg extension", "7")}
    assert globals_in(b"(ios\nsystem\n.") == {("os", "system")}
    assert "os.system" in refusal(archive(b"(S'true'\nios\nsystem\n."))


@pytest.mark.parametrize(
    "function",
    [os.system, builtins.eval, builtins.exec, builtins.__import__, ran, torch.load, torch.hub.load],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_functions_are_refused_by_name_before_anything_is_unpickled(
    function: Any, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(reading, "torch", _Torch(torch, never))
    thing = {"model": nn.Conv2d(1, 1, 1), "x": Call(function, "echo")}
    data = io.BytesIO()
    torch.save(thing, data, pickle_protocol=protocol)
    message = refusal(data.getvalue())
    module = {"builtins": "__builtin__" if protocol == 2 else "builtins"}.get(function.__module__, function.__module__)
    assert f"names {module}.{function.__name__}, which is no part of" in message
    assert message.endswith("Nothing of it was loaded.")


class _Torch:
    def __init__(self, real: Any, load: Any) -> None:
        self.real, self.load = real, load

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize(
    "name",
    [
        ("ultralytics.utils.downloads", "safe_download"),
        ("ultralytics.nn.tasks", "torch_safe_load"),
        ("ultralytics.nn.tasks", "attempt_load_weights"),
        ("ultralytics.nn.tasks", "Path"),
        ("ultralytics.nn.tasks", "nn.Module"),
        ("ultralytics.nn.modules", "__builtins__"),
        ("ultralytics.nn.modules.block", "autopad"),
        ("ultralytics.nn.modules.nowhere", "Conv"),
        ("ultralytics.nn.modules.", "Conv"),
        ("ultralytics.utils.loss", "autocast"),
        ("ultralytics.utils", "YAML"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.nn.modules.module", "torch"),
        ("torch", "load"),
        ("torch", "nn"),
        ("torchvision.transforms.transforms", "Lambda.__init__"),
        ("numpy", "load"),
        ("pathlib", "os"),
        ("builtins", "type"),
        ("nowhere", "FloatStorage"),
        ("yolo_flash", "convert"),
    ],
    ids=".".join,
)
def test_only_classes_of_layers_and_models_are_on_the_list(name: tuple[str, str]) -> None:
    data = f"\x80\x02c{name[0]}\n{name[1]}\n.".encode("latin1")
    assert f"fork.pt names {name[0]}.{name[1]}, " in refusal(archive(data))


def test_many_names_are_counted() -> None:
    data = b"\x80\x02(" + b"".join(f"cos\nn{i}\n".encode() for i in range(9)) + b"t."
    assert "names os.n0, os.n1, os.n2, os.n3, os.n4 and 4 more, which" in refusal(archive(data))


# What is on the list does no harm ------------------------------------------------------------------------------------
def test_no_constructor_runs() -> None:
    """The YAML of a model may hold Python, which its constructor evaluates."""
    code = f"__import__('{__name__}', fromlist=['x']).ran('activation')"
    yaml = {"nc": 1, "activation": code, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": []}
    for call in (Call(DetectionModel, yaml), Call(TorchVision, 3, 3, "resnet18"), Call(nn.Conv2d, 1, 1, 1)):
        content = saved({"model": call})
        message = refusal(content)
        assert message.startswith("fork.pt is damaged: TypeError:"), message
    with contextlib.suppress(Exception), torch.serialization.safe_globals([DetectionModel]):
        torch.load(io.BytesIO(saved({"model": Call(DetectionModel, yaml)})), weights_only=True)
    assert RAN == [("activation",)]  # which is why that is not what reads
    RAN.clear()


def test_attributes_are_taken_of_heads_and_enums_alone() -> None:
    from torchvision.transforms.functional import InterpolationMode
    from ultralytics.nn.modules.head import Detect

    found = read_checkpoint(saved({"a": Detect.forward, "b": InterpolationMode.BILINEAR}), "x.pt")
    assert found == {"a": Detect.forward, "b": InterpolationMode.BILINEAR}
    others: list[Any] = [(Detect, "__init__"), (nn.Conv2d, "load_state_dict"), ("", "join"), (InterpolationMode, "mro")]
    for owner, name in others:
        assert f"takes the attribute {name!r} of" in refusal(saved({"a": Call(getattr, owner, name)}))


def test_a_pickle_leaves_no_trace_on_the_classes_that_it_names() -> None:
    before = dict(vars(nn.Conv2d))
    state = pickle.dumps({"forward": 1, "stride": 2}, 2)[2:-1]
    build = b"\x80\x02ctorch.nn.modules.conv\nConv2d\n" + state + b"b."
    slots = b"\x80\x02ctorch.nn.modules.conv\nConv2d\nN" + state + b"\x86b."
    for data in (build, slots, build.replace(b"torch.nn.modules.conv\nConv2d", b"torch._utils\n_rebuild_parameter")):
        refusal(archive(data))
    assert dict(vars(nn.Conv2d)) == before
    assert not hasattr(torch._utils._rebuild_parameter, "stride")


def test_numbers_of_numpy_hold_nothing_else() -> None:
    import numpy as np

    content = {"a": np.float64(0.25), "b": np.float32(3), "c": np.int64(-7), "d": np.bool_(True)}
    found = read_checkpoint(saved(content), "x.pt")
    assert found == content
    assert [type(value) for value in found.values()] == [type(value) for value in content.values()]
    assert "is no part" in refusal(saved({"a": np.zeros(3)}))
    scalar = np.float64(0).__reduce__()[0]
    assert "only numbers are read" in refusal(saved({"a": Call(scalar, np.dtype("O"), b"abc")}))
    assert "without its bytes" in refusal(saved({"a": Call(scalar, np.dtype("f8"), "abc")}))
    assert "without its bytes" in refusal(saved({"a": Call(scalar, np.dtype("f8"), b"abc")}))


def test_paths_of_both_systems_are_read() -> None:
    for name in ("PosixPath", "WindowsPath"):
        data = b"\x80\x02}X\x01\x00\x00\x00acpathlib\n%s\nX\x04\x00\x00\x00runs\x85Rs." % name.encode()
        assert read_checkpoint(archive(data), "x.pt") == {"a": Path("runs")}


def test_text_is_encoded_as_latin1_alone() -> None:
    assert read_checkpoint(saved({"a": b"\xff\x00"}), "x.pt") == {"a": b"\xff\x00"}
    data = b"\x80\x02}X\x01\x00\x00\x00ac_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00hex\x86Rs."
    assert "encodes a text as 'hex'" in refusal(archive(data))


# Files that are no checkpoints ---------------------------------------------------------------------------------------
def test_other_files_are_told_apart(tmp_path: Path) -> None:
    assert "but an empty file" in refusal(b"")
    assert "not the zip archive that torch.save" in refusal(b"\x89PNG....")
    old = io.BytesIO()
    torch.save({"x": Call(ran)}, old, _use_new_zipfile_serialization=False)
    assert "but a pickle without an archive" in refusal(old.getvalue())
    whole = saved({"model": nn.Conv2d(8, 8, 3)})
    assert "is damaged" in refusal(whole[: len(whole) // 2])
    assert "fork.pt: the pickle is damaged" in refusal(archive(b"\x80\x02}q"))
    assert "is damaged" in refusal(archive(b"\x80\x02(."))
    script = io.BytesIO(saved({}))
    with zipfile.ZipFile(script, "a") as file:
        file.writestr("archive/constants.pkl", b"\x80\x02).")
    assert "is a TorchScript export" in refusal(script.getvalue())
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("a/readme.txt", "x")
    assert "damaged or not a checkpoint" in refusal(other.getvalue())
    assert "list instead of the dict" in refusal(saved([1]))


def test_the_layout_is_seen_without_unpickling(tmp_path: Path) -> None:
    file = save(tiny_fork(), tmp_path / "fork.pt", own=Call(ran))
    assert names_authors_layout(file)
    (tmp_path / "text.pt").write_text("text")
    for name in ("text.pt", "none.pt", "."):
        assert not names_authors_layout(tmp_path / name)
    torch.save({"qk": 1}, tmp_path / "other.pt")
    assert not names_authors_layout(tmp_path / "other.pt")
