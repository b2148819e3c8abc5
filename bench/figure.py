"""Figures: one measurement beside its peer's, and the table that shows them."""

import subprocess
from dataclasses import asdict, dataclass
from typing import Self

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Figure:
    """One measurement beside its peer's.

    Attributes:
        name: The thing measured.
        unit: Unit of `ours` and `peer`.
        ours: Our value; `None` where it could not be measured.
        peer_name: The peer, or the limit that stands in for one.
        peer: The peer's value; `None` where it could not be measured.
        goal: Lowest ratio of `ours` to `peer` that is good enough; `None` where the figure is only shown.
        note: Circumstances that the reader needs.
        error: Why nothing was measured; empty where something was.
    """

    name: str
    unit: str
    ours: float | None
    peer_name: str
    peer: float | None
    goal: float | None
    note: str = ""
    error: str = ""

    @classmethod
    def failed(cls, name: str, error: Exception) -> Self:
        """Return the row of a part that failed, with the error's words."""
        return cls(name, "", None, "", None, None, error=_words(error))

    @property
    def ratio(self) -> float | None:
        """`ours` as a multiple of `peer`."""
        if self.ours is None or not self.peer:
            return None
        return self.ours / self.peer

    @property
    def is_reached(self) -> bool | None:
        """Whether the ratio reaches the goal; `None` where there is no ratio or no goal."""
        if self.ratio is None or self.goal is None:
            return None
        return self.ratio >= self.goal

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio, "reached": self.is_reached}


def table(figures: list[Figure]) -> Table:
    """Return the figures as one table; a failed part's row shows its error in place of numbers."""
    shown = Table("figure", "ours", "peer", "", "ratio", "goal", "note", title="Opsentry bench")
    verdicts = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}
    for figure in figures:
        goal = "" if figure.goal is None else f"≥ {figure.goal:g} {verdicts[figure.is_reached]}"
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}×"
        shown.add_row(
            Text(figure.name),
            _number(figure.ours, figure.unit),
            figure.peer_name,
            _number(figure.peer, figure.unit),
            ratio,
            "[red]failed[/]" if figure.error else goal,
            Text(figure.error or figure.note),
        )
    return shown


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.2f} {unit}"


def _words(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        stderr = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        return stderr.strip().splitlines()[-1]
    return f"{type(error).__name__}: {error}"
