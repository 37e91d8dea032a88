"""The rounds of `bench step`, `predict`, `train` and `run`: sizes, rounds and arms in turn, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import ultralytics
from ultralytics.utils import LOGGER, TQDM

from .._version import __version__
from ..backends.registry import label
from ..machine import cudnn_release
from ..utils.files import Row, as_csv, write_file
from .process import BaseJob, one_round

FIGURES = ("network_kernel_ms", "kernel_ms", "wall_ms", "images_per_second", "peak_gib")
NUMBERS = ("imgsz", "batch", "round", *FIGURES)
VERSIONS = ("torch", "cudnn", "triton", "ultralytics", "yolo_flash")
COLUMNS = (  # of every CSV file: one row for each sample, with figures or an error; a job may have more
    *("command", "model", "imgsz", "batch", "arm", "precision", "round", *FIGURES, "error"),
    *("device", *VERSIONS, "commit"),
)


def bench(job: BaseJob) -> list[dict[str, Any]]:
    """Measure all arms in turns, one size after the other; log a table a size; write the CSV and JSON files.

    Returns:
        For each size the job, the machine and, for each arm, the samples of every round.

    Raises:
        OSError: A file cannot be written.
    """
    rows: list[Row] = []
    machine: dict[str, Any] = {}
    commit = checkout()
    columns = (*COLUMNS, *job.more_columns)
    if job.csv:
        write_file(Path(job.csv), as_csv(columns, rows))  # a folder that is not there is told before an hour has passed
    results: dict[int, dict[str, Any]] = {}
    total = len(job.imgsz) * job.rounds * len(job.arms)
    turns = (
        (imgsz, number, *turn)
        for imgsz in job.imgsz
        for number in range(1, job.rounds + 1)
        for turn in one_round(job.of_round(number), imgsz)
    )
    told = f"bench {job.command} {job.model} imgsz={','.join(map(str, job.imgsz))} batch={job.batch}"
    for imgsz, number, arm, answer in TQDM(turns, told, total):
        machine = answer.pop("machine", machine)
        described = dataclasses.asdict(job) | {"imgsz": imgsz}
        arms: dict[str, Any] = {arm: {"samples": [], "median": {}} for arm in job.arms}
        size = results.setdefault(imgsz, {"yolo_flash": __version__, "job": described, "machine": {}, "arms": arms})
        size["machine"] = machine
        mine = size["arms"][arm]
        mine["samples"].append(answer)
        mine["median"] = summary(mine["samples"])
        row = described | {"command": job.command, "arm": arm, "round": number} | answer
        rows.append({name: value for name, value in row.items() if name in columns})
        # After each process: a borrowed GPU may be taken away.
        if job.csv:
            conditions = _conditions(machine, job) | {"commit": commit}
            write_file(Path(job.csv), as_csv(columns, (row | conditions for row in rows)))
        if job.json:
            write_file(Path(job.json), (json.dumps(size, indent=2) + "\n").encode())
    for size in results.values():
        LOGGER.info(size_table(size, job.columns))
    return list(results.values())


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure -> median, lowest and highest over the rounds; or the error of an arm that failed."""
    if failed := [sample["error"] for sample in samples if "error" in sample]:
        return {"error": failed[0]}
    figures: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        # Not the lists of all epochs.
        if values := [sample[name] for sample in samples if isinstance(sample[name], (int, float))]:
            figures[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return figures


def size_table(results: dict[str, Any], columns: dict[str, str]) -> str:
    """The results of one size as a Markdown table, ready for docs/results.

    Args:
        results: Of `bench`.
        columns: Figure -> its head in the table.
    """
    job = results["job"]
    first = results["arms"][job["arms"][0]]["median"]
    on_data = f" data={job['data']}" if "data" in job else ""
    each = f"{job['steps']} steps" if "steps" in job else f"{job['epochs']} epochs"
    lines = [
        f"{job['model']}{on_data} imgsz={job['imgsz']} batch={job['batch']}, "
        f"{results['machine'].get('precision', job['amp'])}, "
        f"{job['rounds']} processes an arm, {each} each; {results['machine'].get('text', '')}; "
        f"yolo-flash {results['yolo_flash']}",
        "",
        f"| arm | {' | '.join(columns.values())} | speed-up |",
        f"| --- |{' --- |' * len(columns)} --- |",
    ]
    for arm in job["arms"]:
        median = results["arms"][arm]["median"]
        if "error" in median:
            lines.append(f"| {label(arm)} | {median['error']} |{' |' * len(columns)}")
            continue
        key = next(name for name in ("process_s", "iteration_ms", "kernel_ms", "wall_ms") if name in median)
        saved = "" if "error" in first else f"{first[key]['median'] / median[key]['median']:.2f}x"
        lines.append(f"| {label(arm)} | {' | '.join(_cell(median, name) for name in columns)} | {saved} |")
    return "\n".join(lines)


def _cell(median: dict[str, Any], name: str) -> str:
    if name not in median:
        return "-"
    figure, digits = median[name], 3 if name == "map50_95" else 2
    return f"{figure['median']:.{digits}f} ({figure['low']:.{digits}f}..{figure['high']:.{digits}f})"


def _conditions(machine: dict[str, Any], job: BaseJob) -> Row:
    """What the numbers depend on, as far as a process has told it."""
    cudnn = machine.get("cudnn")
    return {
        "precision": machine.get("precision", job.amp),
        "device": machine.get("name"),
        "torch": machine.get("torch"),
        "cudnn": cudnn_release(cudnn) if cudnn else None,
        "triton": machine.get("packages", {}).get("triton"),
        "ultralytics": ultralytics.__version__,
        "yolo_flash": __version__,
    }


def checkout() -> str:
    """The commit of the checkout that this package lies in, with `-dirty` if files differ from it; else empty."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # git would find the repository around an environment
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or a repository that it does not trust
        return ""
