"""Terminal output: rich where it is installed, plain text elsewhere, and nothing but JSON on stdout when asked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

OnSample = Callable[[str, int], None]


class Display:
    """Where the command's words, tables and progress go.

    Parameters
    ----------
    json_only : bool, default=False
        Keep stdout for JSON: tables and notes go to stderr.
    """

    def __init__(self, *, json_only: bool = False) -> None:
        self._stream: TextIO = sys.stderr if json_only else sys.stdout
        self._rich: Any = None
        if importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            width = None if self._stream.isatty() else 132
            self._rich = Console(file=self._stream, highlight=False, soft_wrap=True, width=width)
        else:
            self.note("rich is not installed: plain tables (pip install 'torch-moe[bench]')")

    def note(self, text: str = "") -> None:
        """Print a line."""
        if self._rich is not None:
            self._rich.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is text, the others are numbers."""
        self.note()
        if self._rich is None:
            widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
            print(title, file=self._stream)
            for row in [header, *rows]:
                cells = [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
                print("  ".join(cells).rstrip(), file=self._stream, flush=True)
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)

    @contextmanager
    def progress(self, label: str) -> Iterator[OnSample]:
        """Show that something long runs; yields what `torch_moe.testing.timing.interleave` calls per sample."""
        if self._rich is None or not self._rich.is_terminal:
            self.note(f"{label} ...")
            yield lambda name, number: None
            return
        with self._rich.status(label) as status:
            yield lambda name, number: status.update(f"{label}: round {number + 1}, {name}")
