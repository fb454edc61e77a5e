"""A page from its file: `{{name}}` stands for a text, an included file, or data as JSON that no markup can end."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

_FILES = resources.files(__package__) / "files"
_HOLE = re.compile(r"\{\{([\w.]+)\}\}")


def fill(name: str, /, **parts: str) -> str:
    """The file of this name with its holes filled. parts: HTML by the hole's name; one with a dot is another file.

    Raises KeyError for a hole that nothing fills.
    """

    def part(match: re.Match[str]) -> str:
        hole = match[1]
        return _read(hole) if "." in hole else parts[hole]

    return _HOLE.sub(part, _read(name))


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element; a number that is not finite is an error there."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A page that needs no other file. title: plain text. body: HTML, from top to bottom."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    text = "\n".join(body)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def table(rows: Iterable[Sequence[str]], head: Sequence[str] | None = None) -> str:
    """An HTML table of plain texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(line(cells, 'td') for cells in rows)}</tbody></table>"


def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")
