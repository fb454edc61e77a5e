"""What is different between a checkpoint and the run that goes on from it: settings, data, averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixelgen_fast import config as cfg
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs import checkpoint


def data_changes(old: Any, new: dict[str, Any]) -> list[str]:
    """What to say of data, or an order, that are not those of the checkpoint, where it tells."""
    if not isinstance(old, dict) or not isinstance(old.get("images"), int):
        return []
    changes = []
    if old["images"] != new["images"]:
        changes.append(f"the data have changed: {old['images']:,} images -> {new['images']:,}")
    elif old.get("fingerprint") != new["fingerprint"]:
        changes.append(f"the data have changed: {new['images']:,} images as before, with others among them")
    if old.get("order") != new["order"]:
        before = old.get("order", "an earlier version's, which it does not name")
        changes.append(f"the order of the images has changed: {before} -> {new['order']}")
    return changes


def held_changes(old: Any, new: dict[str, Any]) -> list[str]:
    """What to say of images that are held out and are not those of the checkpoint, where it tells."""
    if not isinstance(old, dict) or old.get("held_out") == new.get("held_out"):
        return []
    meaning = "the validation loss is of other images than before"
    if "held_out" not in old:
        meaning = "those among them that were trained on make the validation loss too low"
    if "held_out" not in new:
        meaning = "none is held out any more"
    return [f"the images that are held out (data.validation) have changed; {meaning}"]


def read_config(saved: dict[str, Any]) -> cfg.Config:
    """The configuration of a generator's run. Raises ConfigError."""
    return cfg.from_dict(saved, model_schema)


def with_defaults(saved: dict[str, Any], read: Callable[[dict[str, Any]], Any] = read_config) -> dict[str, Any]:
    """A checkpoint's configuration with the defaults of settings that are newer; as it is where it is none of today.

    read: makes a configuration of it, or raises ConfigError.
    """
    try:
        return cfg.to_dict(read(saved))
    except cfg.ConfigError:
        return saved


def averages(config: dict[str, Any], path: Path) -> set[float]:
    """The averages that a checkpoint's configuration names. Raises CheckpointError where it names none."""
    try:
        return {float(decay) for decay in config["optimizer"]["ema"]}
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"checkpoint {path} cannot be used: its config has no optimizer.ema"
        ) from error


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """Dotted keys whose values differ between two configurations, with `old -> new`; run.* does not count."""
    changed: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "not a setting"), new.get(key, "not a setting")
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= {} if prefix == "" and key == "run" else differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[f"{prefix}{key}"] = f"{a} -> {b}"
    return changed
