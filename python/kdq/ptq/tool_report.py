"""What a post-training tool did: the report that all of them return."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class ToolReport:
    """What a tool did with the modules it is for: changed (name -> what was done) or left (name -> reason)."""

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __rich__(self) -> Table:
        table = Table("module", "result", title=f"{len(self.changed)} changed, {len(self.left)} left")
        for name, what in self.changed.items():
            table.add_row(name or "(the model)", what, style="bold")
        for name, reason in self.left.items():
            table.add_row(name or "(the model)", f"left: {reason}")
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
