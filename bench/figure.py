"""What a figure is, and how figures are shown."""

from dataclasses import asdict, dataclass

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measurement beside its peer's; `goal` is the ratio to reach, `None` where a figure is only shown."""

    name: str
    unit: str
    ours: float | None
    peer_name: str
    peer: float | None
    goal: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.ours is None or not self.peer:
            return None
        return self.ours / self.peer

    @property
    def reached(self) -> bool | None:
        if self.ratio is None or self.goal is None:
            return None
        return self.ratio >= self.goal

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio, "reached": self.reached}


def table(figures: list[Figure]) -> Table:
    shown = Table("figure", "ours", "peer", "", "ratio", "goal", "note", title="Opsentry bench")
    erasable = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}
    for figure in figures:
        goal = "" if figure.goal is None else f"≥ {figure.goal:g} {erasable[figure.reached]}"
        ratio = "-" if figure.ratio is None else f"{figure.ratio:.2f}×"
        shown.add_row(
            figure.name,
            _number(figure.ours, figure.unit),
            figure.peer_name,
            _number(figure.peer, figure.unit),
            ratio,
            goal,
            figure.note,
        )
    return shown


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.2f} {unit}"
