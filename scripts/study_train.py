"""Training iterations on the clock, in Ultralytics' own trainer: the table of docs/results/graphs-h100.md.

    python scripts/study_train.py path/to/bccd/data.yaml results.jsonl [row ...]      rows: see ROWS

Measured as by `yolo-flash bench train`, one row after the other, except that the processes of all rows load their
libraries side by side before the first is measured. The images are the first ones of the data set, as many as fill
every batch; a few others are validated. One line of JSON a process; a table at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ultralytics.utils import YAML

from yolo_flash.bench.process import answer_of, start, until_ready
from yolo_flash.bench.train import TrainJob

ROWS = {  # model, imgsz, batch, images, arms
    "yolo12n-640-b64": ("yolo12n.yaml", 640, 64, 320, ("unpatched", "graphs")),
    "yolo12s-640-b16": ("yolo12s.yaml", 640, 16, 160, ("unpatched", "graphs")),
    "yolo12x-640-b16": ("yolo12x.yaml", 640, 16, 160, ("unpatched", "graphs")),
    "yolo12n-2048-b4": ("yolo12n.yaml", 2048, 4, 32, ("unpatched", "graphs")),
    "yolo26n-640-b64": ("yolo26n.yaml", 640, 64, 320, ("unpatched", "graphs")),
    "compile": ("yolo12n.yaml", 640, 64, 320, ("compile",)),
    "max-autotune": ("yolo12n.yaml", 640, 64, 320, ("compile_max_autotune",)),
}
EPOCHS, WORKERS = 10, 14


def subset(data: str, count: int) -> str:
    """A data set of the first images of another one, whatever their split."""
    values = YAML.load(data)
    root = Path(data).parent
    files = [str(file.resolve()) for file in sorted(root.glob("images/*/*.jpg"))]
    if len(files) < count:
        sys.exit(f"{root} has {len(files)} images, {count} are needed.")
    for split, some in (("train", files[:count]), ("val", files[-8:])):
        (root / f"bench-{split}-{count}.txt").write_text("\n".join(some) + "\n", encoding="utf-8")
        values[split] = f"bench-{split}-{count}.txt"
    values.pop("path", None)
    file = root / f"bench-{count}.yaml"
    YAML.save(file, {key: value for key, value in values.items() if key != "yaml_file"})
    return str(file)


def main() -> None:
    data, results, *names = sys.argv[1:]
    started: list[tuple[str, str, subprocess.Popen[str]]] = []
    for name in names or [name for name in ROWS if name != "max-autotune"]:  # which compiles for many minutes
        model, imgsz, batch, images, arms = ROWS[name]
        file = subset(data, images)
        job = TrainJob(model=model, imgsz=(imgsz,), batch=batch, arms=arms, data=file, epochs=EPOCHS, workers=WORKERS)
        started += [(name, arm, start(job, imgsz, arm)) for arm in arms]
    said = [until_ready(process) for *_, process in started]
    found: dict[str, dict[str, Any]] = {}
    with Path(results).open("a", encoding="utf-8") as file:
        for (name, arm, process), before in zip(started, said, strict=True):
            answer = answer_of(process, before)
            print(json.dumps({"row": name, "arm": arm, **answer}), file=file, flush=True)
            found.setdefault(name, {})[arm] = answer
            print(
                name, arm, {key: answer.get(key) for key in ("without_loader_ms", "iteration_ms", "error")}, flush=True
            )
    print("\n| row | arm | iteration ms | without the loader | waiting for it | images/s | peak, reserved GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, answers_of in found.items():
        for arm, answer in answers_of.items():
            if "error" in answer:
                print(f"| {name} | {arm} | {answer['error']} | | | | |")
                continue
            epochs, alone = answer["epoch_iteration_ms"][2:], answer["epoch_without_loader_ms"]
            without = f"{answer['without_loader_ms']:.1f} ({min(alone):.1f}..{max(alone):.1f})"
            print(
                f"| {name} | {arm} | {answer['iteration_ms']:.1f} ({min(epochs):.1f}..{max(epochs):.1f}) | "
                f"{without} | {answer['wait_ms']:.1f} | {answer['images_per_second']:.0f} | "
                f"{answer['peak_gib']:.2f}, {answer['reserved_gib']:.2f} |"
            )


if __name__ == "__main__":
    main()
