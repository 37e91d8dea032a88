"""What one verification found: as plain data, and as a table with a verdict."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__
from ..backends.registry import BACKENDS
from ..backends.spec import dtype_name
from .case import Case
from .compare import Comparison
from .detections import CONF, Detections


@dataclass
class Report:
    """What one verification found; `run_case` fills it in.

    Attributes:
        case: What was compared.
        layers: An entry for each mode, layer and backend.
        model: An entry for each mode and quantity of the whole model.
        detections: Of the prediction; None where the model is no detector of upright boxes.
        notes: What the reader should know, a sentence each.
        off: What is off, a sentence each.
    """

    case: Case
    layers: list[dict[str, Any]] = field(default_factory=list)
    model: list[dict[str, Any]] = field(default_factory=list)
    detections: Detections | None = None
    notes: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)

    @property
    def on_fused(self) -> list[dict[str, Any]]:
        """The entries of layers whose results on a fused backend were compared."""
        fused = [name for name, backend in BACKENDS.items() if backend.fused]
        return [entry for entry in self.layers if entry["compared"] and entry["backend"] in fused]

    def entry(self, where: str, row: Comparison) -> dict[str, Any]:
        """A comparison as plain data; if it is off, a sentence in `off` says so."""
        if not row.ok:
            stock = "the stock model is not finite itself"
            if math.isfinite(row.stock):
                stock = f"stock {row.stock:.1e}, allowed {row.allowed:.1e}"
            self.off.append(f"{where}: {row.what} is off by {row.ours:.1e}; {stock}")
        return _as_plain(row, "ok", "used")

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        case = self.case
        return {
            "yolo_flash": __version__,
            "ok": not self.off,
            "off": self.off,
            "fused": any(entry["observed"] for entry in self.on_fused),
            "notes": self.notes,
            "model_name": case.name,
            "source": case.source,
            "imgsz": case.images.shape[-1],
            "batch": len(case.images),
            "dtype": " and ".join(dict.fromkeys(dtype_name(mode.dtype) for mode in case.modes)),
            "device": str(case.machine),
            "machine": dataclasses.asdict(case.machine),
            "layers": self.layers,
            "model": self.model,
            "detections": None if self.detections is None else _as_plain(self.detections, "ok"),
        }


def _as_plain(facts: Any, *properties: str) -> dict[str, Any]:
    """A dataclass, and properties of it, as a dict; JSON knows no NaN."""
    values = dataclasses.asdict(facts) | {name: getattr(facts, name) for name in properties}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def as_text(facts: dict[str, Any]) -> str:
    """A line for each layer, mode and backend, then the whole model, the detections and what is off."""
    wide = max([27, *(len(entry["layer"]) for entry in facts["layers"])])
    lines = [
        f"yolo-flash verify: {facts['model_name']}, imgsz {facts['imgsz']}, batch {facts['batch']}, "
        f"{facts['dtype']} on {facts['device']}",
        f"  images: {facts['source']}",
        *(f"  note: {note}" for note in facts["notes"]),
        "  relative errors against float64, the worst of each row; ours may be twice that of stock, plus rounding",
        f"  {'mode':<9}{'layer':<{wide}} {'backend':<16}{'ours':>10}{'stock':>12}  {'ok':<5}worst",
        *(_row(e["mode"], f"{e['layer']:<{wide}}", e["backend"], e["compared"], e["ok"]) for e in facts["layers"]),
    ]
    for mode in ("train", "predict"):
        for name in ("outputs", "loss", "gradients"):
            if rows := [row for row in facts["model"] if row["mode"] == mode and row["what"].startswith(name)]:
                lines.append(_row(mode, f"{f'whole model, {name}':<{wide}}", "", rows, all(row["ok"] for row in rows)))
    lines.append(f"  detections: {_found(facts['detections'])}")
    lines += [f"  OFF: {sentence}" for sentence in facts["off"]]
    count = len({entry["layer"] for entry in facts["layers"]})
    verdict = f"{count} attention layers compute what stock computes" if facts["ok"] else "something is OFF, see above"
    if len(facts["off"]) == 1 and not facts["fused"]:
        verdict = "nothing was proved, see above"
    return "\n".join([*lines, f"yolo-flash verify: {verdict}"])


def _row(mode: str, layer: str, backend: str, rows: list[dict[str, Any]], ok: bool) -> str:
    if not rows:
        return f"  {mode:<9}{layer} {backend:<16}{'-':>10}{'-':>12}  OFF  it raised"
    worst = max(rows, key=lambda row: math.inf if row["used"] is None else row["used"])
    errors = f"{_scientific(worst['ours']):>10}{_scientific(worst['stock']):>12}"
    return f"  {mode:<9}{layer} {backend:<16}{errors}  {'ok' if ok else 'OFF':<5}{worst['what']}"


def _found(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not of this task; the raw outputs above have to do"
    if not found["stock"] and not found["ours"]:
        return f"none with a score above {CONF}, by stock and by ours"
    score, box, allowed_score, allowed_box = (
        _scientific(found[key]) for key in ("score", "box", "allowed_score", "allowed_box")
    )
    return (
        f"stock {found['stock']}, ours {found['ours']}, the same {found['matched']}; scores differ by {score} "
        f"(allowed {allowed_score}), boxes by {box} pixels (allowed {allowed_box}): {'ok' if found['ok'] else 'OFF'}"
    )


def _scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
