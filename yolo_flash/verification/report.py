"""What one verification found: as plain data, and as a table with a verdict."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__
from ..backends.registry import BACKENDS, label
from ..backends.spec import dtype_name
from .case import Case
from .compare import Comparison
from .detections import CONF, Detections

_HOW_APPROXIMATE = (
    "  approximate: such rows say how far ours is from exact attention; each layer was also held against its window in "
    "float64"
)


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

    @property
    def approximate(self) -> list[dict[str, Any]]:
        """The entries of layers of the plan whose backend is approximate, so that the model may be off by design."""
        return [entry for entry in self.layers if entry["of_plan"] and not entry["exact"]]

    def entry(self, where: str, row: Comparison, judged: bool = True) -> dict[str, Any]:
        """A comparison as plain data; if it is off, a sentence in `off` says so.

        Of one that is not `judged`, since what ran is approximate, only numbers that are not finite are off.
        """
        if not (row.ok if judged else math.isfinite(row.ours)):
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
            "approximate": bool(self.approximate),
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
    named = max([16, *(len(label(entry["backend"])) for entry in facts["layers"])])
    lines = [
        f"yolo-flash verify: {facts['model_name']}, imgsz {facts['imgsz']}, batch {facts['batch']}, "
        f"{facts['dtype']} on {facts['device']}",
        f"  images: {facts['source']}",
        *(f"  note: {note}" for note in facts["notes"]),
        "  relative errors against float64, the worst of each row; ours may be twice that of stock, plus rounding",
        *([_HOW_APPROXIMATE] if facts["approximate"] else []),
        f"  {'mode':<9}{'layer':<{wide}} {'backend':<{named}}{'ours':>10}{'stock':>12}  {'ok':<5}worst",
        *(
            _row(
                *(e["mode"], f"{e['layer']:<{wide}} {label(e['backend']):<{named}}"),
                *(e["compared"], _word(e["ok"], not e["exact"])),
            )
            for e in facts["layers"]
        ),
    ]
    for mode in ("train", "predict"):
        for name in ("outputs", "loss", "gradients"):
            if rows := [row for row in facts["model"] if row["mode"] == mode and row["what"].startswith(name)]:
                word = _word(facts["approximate"] or all(row["ok"] for row in rows), facts["approximate"])
                lines.append(_row(mode, f"{f'whole model, {name}':<{wide + 1 + named}}", rows, word))
    lines.append(f"  detections: {_found(facts['detections'], facts['approximate'])}")
    lines += [f"  OFF: {sentence}" for sentence in facts["off"]]
    count = len({entry["layer"] for entry in facts["layers"]})
    verdict = f"{count} attention layers compute what stock computes" if facts["ok"] else "something is OFF, see above"
    if facts["ok"] and facts["approximate"]:
        near = [entry for entry in facts["layers"] if not entry["exact"]]
        far = max(row["ours"] for entry in near for row in entry["compared"])
        verdict = (
            f"{len({entry['layer'] for entry in near})} of {count} attention layers are approximate: they compute "
            f"their window, and are up to {far:.1e} away from exact attention; the others compute what stock computes"
        )
    if len(facts["off"]) == 1 and not facts["fused"]:
        verdict = "nothing was proved, see above"
    return "\n".join([*lines, f"yolo-flash verify: {verdict}"])


def _row(mode: str, what: str, rows: list[dict[str, Any]], word: str) -> str:
    if not rows:
        return f"  {mode:<9}{what}{'-':>10}{'-':>12}  OFF  it raised"
    worst = max(rows, key=lambda row: math.inf if row["used"] is None else row["used"])
    errors = f"{_scientific(worst['ours']):>10}{_scientific(worst['stock']):>12}"
    return f"  {mode:<9}{what}{errors}  {word:<5}{worst['what']}"


def _word(ok: bool, approximate: bool) -> str:
    """What the column of verdicts says."""
    return "OFF" if not ok else "approximate  " if approximate else "ok"


def _found(found: dict[str, Any] | None, approximate: bool) -> str:
    if found is None:
        return "not of this task; the raw outputs above have to do"
    if not found["stock"] and not found["ours"]:
        return f"none with a score above {CONF}, by stock and by ours"
    score, box, allowed_score, allowed_box = (
        _scientific(found[key]) for key in ("score", "box", "allowed_score", "allowed_box")
    )
    return (
        f"stock {found['stock']}, ours {found['ours']}, the same {found['matched']}; scores differ by {score} "
        f"(allowed {allowed_score}), boxes by {box} pixels (allowed {allowed_box}): "
        f"{_word(approximate or found['ok'], approximate).rstrip()}"
    )


def _scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
