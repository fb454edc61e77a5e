"""Values of a configuration from a file and from the command line, merged over a schema of dataclasses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixelgen_fast.settings import ConfigError


@dataclass(frozen=True)
class Override:
    """`key.sub=value` as typed. A text stays the text that it is; numbers, lists and null are YAML."""

    key: str
    text: str

    def values(self, schema: type, model_class: type | None = None) -> Any:
        """A tree with this one value, of the type that the schema has for it. Raises ConfigError where it has none."""
        kind = _type_of(self.key, schema, model_class)
        texts = kind in (str, str | None) and (kind is str or self.text.strip() not in ("", "null", "~"))
        quoted = self.text[:1] in ("'", '"')
        value: Any = self.text
        try:
            # behind " #" YAML would see a comment, and 007 as a number
            if quoted or not (texts or " #" in self.text):
                value = OmegaConf.from_dotlist([f"value={self.text}"])["value"]
            values = OmegaConf.create({})
            OmegaConf.update(values, self.key, value)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
            raise ConfigError(f"{self.key}={self.text}: not a value: {str(error).splitlines()[0]}") from error
        return values


def read_layers(path: str | Path, overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """(origin, values) of a YAML file and of each override, for a merge that names who is wrong.

    Raises ConfigError for a missing or malformed file and for an override without "=".
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such configuration file" + (f"; there are {', '.join(near)}" if near else ""))
    try:
        values = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this file holds {type(values).__name__}")
    return [(str(path), values), *override_layers(overrides)]


def override_layers(overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """(origin, values) of each override. Raises ConfigError for one without "="."""
    layers: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        # OmegaConf would read brackets as places in lists
        if not equals or not all(part.strip() for part in key.split(".")) or "[" in key or "]" in key:
            raise ConfigError(f"override {text!r}: write key.sub=value, for example optimizer.lr=2e-4")
        layers.append((f"override {text!r}", Override(*text.split("=", 1))))
    return layers


def merge(schema: type, layers: list[tuple[str, Any]], model_class: type | None = None) -> Any:
    """(origin, values) layers over the defaults of a schema, later over earlier. Raises ConfigError that names who.

    model_class: the dataclass of the section `model`, where the schema leaves it open.
    """
    merged = OmegaConf.structured(schema)
    if model_class is not None:
        merged.model = OmegaConf.structured(model_class)
    for origin, layer in layers:
        values = layer.values(schema, model_class) if isinstance(layer, Override) else layer
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{origin}: {explain(error, schema, model_class)}") from error
    try:
        return _expanded(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{layers[0][0]}: {explain(error, schema, model_class)}") from error


def _expanded(settings: Any) -> Any:
    """The same tree, in which a path that begins with ~ is one."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if is_dataclass(value):
            _expanded(value)
        elif isinstance(value, str) and value.startswith("~"):
            setattr(settings, entry.name, str(Path(value).expanduser()))
    return settings


def _type_of(key: str, schema: type, model_class: type | None) -> Any:
    """The type of a setting or section; None for a key that the schema does not have or leaves open."""
    owner: Any = schema
    for depth, part in enumerate(key.split(".")):
        owner = get_type_hints(owner).get(part) if is_dataclass(owner) else None
        owner = model_class if depth == 0 and part == "model" and model_class is not None else owner
    return owner


def explain(error: OmegaConfBaseException, schema: type, model_class: type | None = None) -> str:
    """The error's first line; for an unknown key, the nearest one and all that its section has.

    model_class: the dataclass of the section `model`, which the schema leaves open.
    """
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if not key:
        return message
    section, _, name = key.rpartition(".")
    owner = _type_of(section, schema, model_class) if section else schema
    valid = [f.name for f in fields(owner)] if is_dataclass(owner) else []
    if name in valid or not valid:
        return f"{key}: {message}"
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f"; did you mean {f'{section}.' if section else ''}{near[0]}?" if near else ""
    return f"{key}: unknown key{hint} Valid in {section or 'the file'}: {', '.join(valid)}"
