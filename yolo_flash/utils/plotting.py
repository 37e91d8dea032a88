"""What all pictures share: colours, figures, PNG."""

from __future__ import annotations

import io
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart: one for each backend, unfused ones in greys. The
# arms of `bench` that are no backends have colours that differ from all of these in lightness.
COLORS = {
    "stock": "#a0a0a0",
    "sdpa_math": "#606060",
    "sdpa_flash": "#56b4e9",
    "sdpa_efficient": "#cc79a7",
    "sdpa_cudnn": "#0072b2",
    "triton_area": "#d55e00",
    "flash_attn_2": "#f0e442",
    "flash_attn_3": "#ddcc77",
    "flash_attn_4": "#009e73",
    "xformers": "#aa4499",
    "sparse_window": "#117733",
    "nchw": "#999933",
    "unpatched": "#000000",
    "auto": "#882255",
    "graphs": "#332288",
}


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches, of 120 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which is state of the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any) -> bytes:
    """The figure as the content of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
