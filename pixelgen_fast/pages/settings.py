"""The configuration as a table for reading: each setting, its value, and the default where the value is another."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any


def defaults_of(config: Any) -> dict[str, Any]:
    """The defaults of a configuration's kind, those of its system among them."""
    found = asdict(type(config)())
    own = {f.name: getattr(config, f.name) for f in fields(config)}
    if is_dataclass(own.get("model")):
        found["model"] = asdict(type(own["model"])())
    return found


def settings_table(values: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> str:
    """HTML of a configuration, a foldable part a section. defaults: None where they are not known."""
    parts = []
    for section, settings in values.items():
        known = None if defaults is None else defaults.get(section, {})
        rows = list(_rows(settings, known) if isinstance(settings, Mapping) else [("", _text(settings), None)])
        changed = sum(default is not None for _, _, default in rows)
        note = f'<span class="note">{changed} of {len(rows)} not at their default</span>' if changed else ""
        lines = "".join(_line(*row) for row in rows)
        parts.append(
            f"<details{' open' * bool(changed)}><summary>{html.escape(section)}{note}</summary>"
            f'<div class="scroll"><table class="settings"><tbody>{lines}</tbody></table></div></details>'
        )
    return "".join(parts)


def _rows(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str | None]]:
    """(name, value, default where it is known and another); dotted names below a section's own sections."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            below = None if defaults is None else defaults.get(name)
            inner = _rows(value, below if isinstance(below, Mapping) else None)
            yield from ((f"{name}.{key}", text, default) for key, text, default in inner)
            continue
        text = _text(value)
        default = None if defaults is None or name not in defaults else _text(defaults[name])
        yield name, text, None if default == text else default


def _line(name: str, value: str, default: str | None) -> str:
    name, value = html.escape(name), html.escape(value)
    if default is None:
        return f"<tr><td>{name}</td><td>{value}</td><td></td></tr>"
    return f'<tr class="changed"><td>{name}</td><td>{value}</td><td>default {html.escape(default)}</td></tr>'


def _text(value: Any) -> str:
    """A value as YAML has it, in a line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "[" + ", ".join(_text(one) for one in value) + "]"
        case Mapping():
            return "{" + ", ".join(f"{key}: {_text(one)}" for key, one in value.items()) + "}"
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
