"""Tables as Markdown, in columns that line up in the source as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tabulate import tabulate


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Cells as they are: nothing is taken for a number, and rounded or aligned by it."""
    return tabulate([[*row] for row in rows], [*head], tablefmt="github", disable_numparse=True)
