"""Summary: a small table that prints as plain text, and as a rich table where rich prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Summary(NamedTuple):
    """A table: ``print`` writes aligned text, ``rich.print`` a table of rich.

    Attributes
    ----------
    title : str
        Its first line.
    header : sequence of str
        The names of the columns.
    rows : sequence of sequence of str
        The cells.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Return the table as text, every column aligned to the right."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *(line.rstrip() for line in text)])

    def __rich__(self) -> Table:
        """Return what rich prints; only rich calls this, so that nobody else needs it."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in self.header:
            table.add_column(name, justify="right")  # names wrap at their spaces
        for row in self.rows:
            table.add_row(*row)
        return table
