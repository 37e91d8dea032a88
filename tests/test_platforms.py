"""Nothing assumes Linux: what Windows and macOS lack is taken away from a process, which then does all the rest.

Paths and `os.name` stay as they are: pathlib has no class for the paths of another system.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest

import yolo_flash
from yolo_flash import FlashConfig

SOURCE = Path(yolo_flash.__file__).parent
PLATFORMS = {"Windows": ("win32", ["triton", "resource", "fcntl"]), "Darwin": ("darwin", ["triton"])}

ELSEWHERE = """
import multiprocessing, os, platform, sys, sysconfig
system, name, lacking = {system!r}, {name!r}, {lacking!r}
import matplotlib.font_manager, psutil, torch, torch._dynamo, ultralytics.models  # as they do on this machine
multiprocessing.set_start_method("spawn", force=True)
sysconfig.get_config_vars()  # is asked later, and keeps the answer
fonts = matplotlib.font_manager.findSystemFonts()  # elsewhere it asks the registry of Windows
matplotlib.font_manager.findSystemFonts = lambda *args, **kwargs: fonts
for module in lacking:
    sys.modules[module] = None  # any import of it raises
for function in [f for f in dir(os) if f in ("fork", "forkpty", "register_at_fork") or f.startswith("sched_")]:
    delattr(os, function)
if hasattr(os, "process_cpu_count"):  # of Python 3.13: without sched_getaffinity it is this
    os.process_cpu_count = os.cpu_count
if system == "Windows":
    for function in ("getuid", "geteuid", "killpg", "setsid", "nice", "getloadavg", "sysconf"):
        delattr(os, function)
    info = type("pmem", (), dict(rss=2**30, peak_wset=3 * 2**30))
    psutil.Process.memory_info = lambda self: info
psutil.MACOS = system == "Darwin"
sys.platform, platform.system = name, lambda: system
"""


def elsewhere(system: str, code: str) -> str:
    """What a process prints that lacks what another system lacks."""
    name, lacking = PLATFORMS[system]
    script = Path("elsewhere.py")  # a file: workers that are spawned import it
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    before = ELSEWHERE.format(system=system, name=name, lacking=lacking)
    script.write_text(f"if __name__ == '__main__':\n    exec({before!r})\n{body}\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("system", PLATFORMS)
def test_every_module_imports_and_a_model_is_planned_and_runs(system: str) -> None:
    """On Windows and macOS, for a CPU; Triton has no wheel there."""
    out = elsewhere(
        system,
        """
import importlib, json, pkgutil, torch, yolo_flash
for module in pkgutil.walk_packages(yolo_flash.__path__, "yolo_flash."):
    if not module.name.endswith(("__main__", "_triton")):
        importlib.import_module(module.name)
from ultralytics import YOLO
from yolo_flash import checks, patch_model, plan
from yolo_flash.utils.memory import peak_memory_gib
model = patch_model(YOLO("yolo12n.yaml"), autotune=False)
rows = plan(model, imgsz=64, batch=2, device="cpu")
checks(device="cpu")
with torch.no_grad():
    model.model.eval()(torch.rand(1, 3, 64, 64))
peak = peak_memory_gib(torch.device("cpu"))[0]
reason = rows[0].decision.refused["triton_area"]
print("answer", json.dumps([len(rows), peak, reason]))
""",
    )
    rows, peak, reason = json.loads(out.split("answer ")[1])
    assert rows == 16
    assert peak == 3 if system == "Windows" else 0 < peak < 64  # of Windows' own counter
    assert reason


def test_a_run_with_spawned_workers(tiny_args: dict[str, Any]) -> None:
    """Without fork, workers are new processes that get their data set by pickle."""
    args = {**tiny_args, "workers": 1}
    out = elsewhere(
        "Windows",
        f"""
from pathlib import Path
from ultralytics import YOLO
from yolo_flash import patch_model
model = patch_model(YOLO("yolo12n.yaml"), backend="sdpa_flash")
model.train(**{args!r})
folder = Path(model.trainer.save_dir)
print("answer", sorted(file.name for file in folder.glob("**/*") if file.name in ("best.pt", "flash.jsonl")))
""",
    )
    assert "answer ['best.pt', 'flash.jsonl']" in out


def test_no_module_names_what_only_linux_has() -> None:
    """`resource` and /proc are guarded where they are, see `utils.memory` and `machine`."""
    functions, modules = "fork|sched_|getuid|killpg|setsid|sysconf|nice", "fcntl|pwd|grp"
    only_linux = re.compile(rf"os\.({functions})|import ({modules})|/dev/|/tmp/|/proc/")
    found = {
        f"{file.name}: {match[0]}"
        for file in SOURCE.rglob("*.py")
        for match in only_linux.finditer(file.read_text(encoding="utf-8"))
    }
    assert found == {"machine.py: /proc/", "profiler.py: /proc/"}


def test_text_is_utf_8_wherever_it_is_read_or_written() -> None:
    """The locale of Windows is another one."""
    calls = re.compile(r"(?:read_text|write_text|\.open|\bopen)\((?:[^()]|\([^()]*\))*\)")
    without = [
        f"{file.name}: {call[0]}"
        for file in SOURCE.rglob("*.py")
        for call in calls.finditer(file.read_text(encoding="utf-8"))
        if "encoding" not in call[0] and '"rb"' not in call[0]
    ]
    assert not without


def test_paths_of_windows_are_settings() -> None:
    """A drive and backslashes reach the setting as they are typed; a pattern of layers has no drive."""
    path = str(PureWindowsPath("C:/my runs/fast.yaml"))
    Path(path).write_text("backend: sdpa_math\nlayers: {'model.6.*': stock}\n", encoding="utf-8")  # a name on Linux
    for config in (FlashConfig.resolve(cli={"config": path}), FlashConfig.resolve(config=path)):
        assert (config.backend, dict(config.layers)) == ("sdpa_math", {"model.6.*": "stock"})
