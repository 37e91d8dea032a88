"""Compile our Triton kernels for cards that are not there: registers, spills and shared memory of every tile.

    python scripts/study_compile.py compile [sm_80 ...] [32/64 ...]    # with the Triton of this environment
    python scripts/study_compile.py table docs/results/compile-triton.md 3.3.1 3.4.0 3.5.1

`compile` runs the compiler and the `ptxas` that come with Triton, which need no GPU. `table` has pip fetch each version
of Triton into a temporary folder, runs `compile` with it in a fresh process, and writes a row a version and card.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # a block may have that much shared memory on sm_..
DIMS = ((32, 32), (32, 64), (36, 72), (64, 64), (128, 128))  # of a key and of a value: YOLO12; 10, 11 and 26; 10m
SEQ_LENS = (400, 1600, 6400, 8191)  # one for each row of `tiles_for`, with rests that do and do not fill a tile
POINTERS = {  # of each kernel, in order; the statistics are float32
    "area_forward": {"qkv": "", "out": "", "image": "", "lse": "*fp32"},
    "area_backward_q": {"qkv": "", "out": "", "dout": "", "lse": "*fp32", "deltas": "*fp32", "dqkv": ""},
    "area_backward_kv": {"qkv": "", "dout": "", "dimage": "", "lse": "*fp32", "deltas": "*fp32", "dqkv": ""},
}


# Compile --------------------------------------------------------------------------------------------------------------
def jobs(sm: int, dims: list[str]) -> Iterator[tuple[str, int, int, int, Any]]:
    """`(kernel, seq_len, head_dim, head_dim_v, tiles)`: one for each tiles that a card may get, by head dims."""
    from yolo_flash.kernels import area

    seen = set()
    for dim, dim_v in [pair for pair in DIMS if not dims or f"{pair[0]}/{pair[1]}" in dims]:
        for kernel in POINTERS:
            for seq_len in SEQ_LENS:
                tiles = area.tiles_for(kernel, seq_len, dim, dim_v, divmod(sm, 10))  # type: ignore[arg-type]
                if (job := (kernel, dim, dim_v, tiles)) not in seen:
                    seen.add(job)
                    yield kernel, seq_len, dim, dim_v, tiles


def resources(sm: int, kernel: str, seq_len: int, dim: int, dim_v: int, tiles: Any, dtype: str = "fp16") -> Any:
    """Registers of a thread, bytes that it spills, and bytes of shared memory of a block.

    Raises:
        RuntimeError: Triton, or its ptxas, does not compile the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from yolo_flash.kernels import area, area_triton

    function = getattr(area_triton, kernel)
    constants = area.constants_of(tiles, seq_len, dim, dim_v, ptx=True)
    pointers = {name: kind or f"*{dtype}" for name, kind in POINTERS[kernel].items()}
    scalars = {"seq_len": "i32", "num_heads": "i32", "scale": "fp32"}
    signature = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    if list(signature) != list(function.arg_names):
        raise RuntimeError(f"{kernel} takes {function.arg_names}, not {list(signature)}")
    aligned = list(range(len(pointers))) + ([len(pointers)] if seq_len % 16 == 0 else [])
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=area.options_of(tiles))
    used = _ptxas(compiled.asm["ptx"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    return {**used, "shared": compiled.metadata.shared}


def _ptxas(ptx: str, folder: Path) -> dict[str, int]:
    """What ptxas tells of a kernel."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
    tools = [tool for name in ("ptxas", "ptxas-blackwell") if (tool := folder / name).exists()]
    if int(re.sub(r"\D", "", target)) >= 100:
        tools.reverse()
    with tempfile.TemporaryDirectory() as temporary:
        (file := Path(temporary) / "kernel.ptx").write_text(ptx)
        for tool in tools:  # Triton 3.9 writes for Hopper what its older ptxas cannot read, and takes the other one
            command = [str(tool), "-v", f"--gpu-name={target}", str(file), "-o", str(file.with_suffix(".cubin"))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not done.returncode:
                break
        else:
            raise RuntimeError(f"ptxas: {done.stderr.strip().replace(temporary, '')}")
    registers, spilt = re.search(r"Used (\d+) registers", done.stderr), re.search(r"(\d+) bytes spill st", done.stderr)
    return {"registers": int(registers[1]), "spilt": int(spilt[1]) if spilt else 0}  # type: ignore[index]


def compile_all(sms: list[int], dims: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel that `auto` may start on these cards, for all head dims or some."""
    import triton

    for sm in sms:
        for kernel, seq_len, dim, dim_v, tiles in jobs(sm, dims):
            row: dict[str, Any] = {
                "triton": triton.__version__,
                "sm": sm,
                "kernel": kernel,
                "dims": f"{dim}/{dim_v}",
                "tiles": str(tiles),
            }
            try:
                row |= resources(sm, kernel, seq_len, dim, dim_v, tiles)
            except Exception as error:  # a compiler raises whatever it likes
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            yield row


# Table ----------------------------------------------------------------------------------------------------------------
def compiled_with(version: str) -> list[dict[str, Any]]:
    """The rows of a version of Triton, which pip fetches for the time of it."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", temporary, f"triton=={version}"]
        subprocess.run(pip, check=True)
        paths = [temporary, str(Path(__file__).parent.parent)]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": f"{temporary}/cache"}
        command = [sys.executable, __file__, "compile"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:  # the compiler may abort the process
            last = (done.stderr.strip().splitlines() or ["aborted"])[-1]
            rows.append({"triton": version, "sm": 0, "error": last[:200]})
        return rows


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line of the table for each card: kernels, the most registers, spills and shared memory."""
    for sm in sorted({row["sm"] for row in rows}):
        of_card = [row for row in rows if row["sm"] == sm]
        good = [row for row in of_card if "error" not in row]
        bad = "; ".join(sorted({f"{row.get('kernel', 'all')}: {row['error']}" for row in of_card if "error" in row}))
        cells = [of_card[0]["triton"], f"sm_{sm}", f"{len(good)} of {len(of_card)}"]
        if good:
            spilling = [row for row in good if row["spilt"]]
            worst = max(good, key=lambda row: row["shared"])
            cells.append(str(max(row["registers"] for row in good)))
            where = ", ".join(sorted({f"{row['kernel']} {row['dims']}" for row in spilling}))
            cells.append(f"{max(row['spilt'] for row in spilling)} ({where})" if spilling else "0")
            cells.append(f"{worst['shared'] / 1024:.0f} of {SHARED_KIB[sm]} KiB ({worst['kernel']} {worst['dims']})")
        yield f"| {' | '.join([*cells, *[''] * (6 - len(cells))])} | {bad} |"


def main(args: list[str]) -> None:
    """See the head of the file."""
    if args[0] == "compile":
        cards = [int(word.removeprefix("sm_")) for word in args[1:] if word.startswith("sm_")]
        for row in compile_all(cards or list(SHARED_KIB), [word for word in args[1:] if "/" in word]):
            print(json.dumps(row), flush=True)
        return
    file, versions = Path(args[1]), args[2:]
    lines = []
    for version in versions:
        rows = compiled_with(version)
        lines += summary(rows)
        print("\n".join(summary(rows)), flush=True)
        table = [
            "# Our Triton kernels, compiled without a GPU",
            "",
            f"Made by `python scripts/study_compile.py table docs/results/compile-triton.md {' '.join(versions)}`.",
            "Every tile that `tiles_for` gives a card, for head dims 32/32, 32/64, 36/72, 64/64 and 128/128 in",
            "float16, through the compiler and the `ptxas` of each Triton. Nothing ran: that a kernel fits a card",
            "says nothing of its speed there. Registers are of a thread (255 at most), spills are bytes of a thread,",
            "shared memory is of a block. No YOLO but yolov10m (36/72) has other head dims than 32/32 and 32/64.",
            "",
            "| Triton | card | compiled | most registers | most spilt | most shared memory | errors |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
        ]
        file.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
