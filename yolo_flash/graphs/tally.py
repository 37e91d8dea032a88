"""How the steps of an epoch ran: how many were replayed, and why the others ran eager."""

from __future__ import annotations

from collections import Counter
from typing import Any

REPLAYED = "replayed"


class Tally:
    """Counts steps by their outcome.

    Attributes:
        outcome: Of the step under way: `REPLAYED`, or why it runs eager; None between steps.
    """

    def __init__(self) -> None:
        self.outcome: str | None = None
        self._counts: Counter[str] = Counter()

    def close_step(self) -> bool:
        """Count the step under way, if there is one; whether it was replayed."""
        outcome, self.outcome = self.outcome, None
        if outcome is not None:
            self._counts[outcome] += 1
        return outcome == REPLAYED

    def close_epoch(self) -> dict[str, Any]:
        """`steps`, `replayed`, and `eager`: how many ran so, by their reason. The next epoch counts from zero."""
        counts, self._counts = self._counts, Counter()
        replayed = counts.pop(REPLAYED, 0)
        return {"steps": counts.total() + replayed, "replayed": replayed, "eager": dict(counts)}
