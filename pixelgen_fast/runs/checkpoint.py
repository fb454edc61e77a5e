"""Checkpoints that know neither world size nor ZeRO stage, and are either whole or not there.

    <run>/checkpoints/000000012800/            the clock: images seen
        rank00000-000.safetensors ...          tensors `<kind>/<parameter>`, kind = master, exp_avg and exp_avg_sq
                                               (of Muon: momentum), ema_<decay>; and `buffer/<name>`. Rank i mod W
                                               writes parameter i
        state.json                             format, nimg, optimizer counters, versions, and what the trainer gives
        manifest.json                          size and CRC-32 of every file and of itself; written last
    <run>/checkpoints/suspect-000000012864/    one taken when the run was no longer sound; never resumed from

A checkpoint is assembled under a temporary name, synced to disk and renamed, so a crash at any moment leaves the
earlier ones as they were. `describe` takes what is to be written while training waits, `write` puts it on disk, at once
(`save`) or behind the training (saver.py).

This file does not import DeepSpeed: sampling and export read checkpoints without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from pixelgen_fast.atomic import sync
from pixelgen_fast.runs.folder import CHECKPOINTS
from pixelgen_fast.runs.manifest import FORMAT, MANIFEST, Files, damage, seal, write_manifest
from pixelgen_fast.runs.plain import check_types, read_object
from pixelgen_fast.runs.ranks import Ranks, everyone
from pixelgen_fast.runs.shards import BUFFER, CheckpointError, open_shards, read_weights, shape_of, write_shards

__all__ = [
    "CheckpointError", "DiskSpaceError", "Engine", "checkpoints", "damage", "describe", "ema_key", "find",
    "latest_valid", "load", "read_state", "read_weights", "save", "set_aside", "write",
]  # fmt: skip

STATE = "state.json"
# what a run's state has beside the checkpoint's own; see Trainer
RUN = {"config": dict, "classes": list, "seconds": float}
_OWN = {"format": int, "nimg": int, "optimizer": dict, "stage": int, "world": int}
_TEMPORARY, _SUSPECT = "tmp-", "suspect-"
_SHARD_BYTES = 2**30
_SLACK_BYTES = 2**20

log = logging.getLogger(__name__)


class DiskSpaceError(CheckpointError):
    """There is no room for a checkpoint. Training can go on and try again. `needed` and `free` are in bytes."""

    def __init__(self, folder: str, needed: int, free: int) -> None:
        super().__init__(folder, needed, free)
        self.folder, self.needed, self.free = folder, needed, free

    def __str__(self) -> str:
        return f"a checkpoint in {self.folder} needs {self.needed} bytes and {self.free} are free; make room there"


class Engine(Protocol):
    """What is saved and restored: `pixelgen_fast.engine.zero.ZeroEngine`, or anything that offers the same.

    `gather` gives tensors that later steps do not change.
    """

    rank: int
    world: int
    host_group: dist.ProcessGroup | None
    stage: int
    shapes: dict[str, tuple[int, ...]]

    def names(self) -> list[str]: ...
    def kinds(self, name: str) -> list[str]: ...
    def gather(self, name: str, kinds: list[str] | None = None, to: int | None = None) -> dict[str, Tensor]: ...
    def restore(self, name: str, state: dict[str, Tensor]) -> None: ...
    def buffers(self) -> dict[str, Tensor]: ...
    def restore_buffers(self, buffers: dict[str, Tensor]) -> None: ...
    def scalars(self) -> dict[str, int]: ...
    def load_scalars(self, scalars: dict[str, int]) -> None: ...


@dataclass(frozen=True)
class Content:
    """A checkpoint to be written. shards: of this rank; text: of state.json; needed: bytes of all of it.

    Then all but the newest `keep` checkpoints and those of the images `good` are deleted.
    """

    folder: Path
    nimg: int
    text: str
    needed: int
    shards: Iterable[dict[str, Tensor]]
    keep: int
    good: frozenset[int]


def describe(
    folder: Path | str, engine: Engine, *, nimg: int, state: dict[str, Any], keep: int, good: Collection[int] = ()
) -> Content:
    """The checkpoint of image `nimg`, its shards gathered as they are asked for. All ranks must call and take them.

    state: JSON types only, the same on every rank; stored beside `format`, `nimg`, `optimizer` (its counters), `stage`,
    `world` and `versions`. Raises ValueError for keep < 1; TypeError for a state that is not plain.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    own = {"format": FORMAT, "nimg": nimg, "optimizer": engine.scalars(), "stage": engine.stage, "world": engine.world}
    own["versions"] = {name: metadata.version(name) for name in ("torch", "deepspeed", "safetensors")}
    text = json.dumps({**state, **own}, indent=1)
    return Content(Path(folder), nimg, text, _bytes_needed(engine), _shards(engine), keep, frozenset(good))


def write(content: Content, team: Ranks) -> Path:
    """Write a checkpoint, then delete older ones; returns its path. All ranks must call.

    A valid checkpoint of the same nimg is left as it is; a damaged one is replaced. Raises DiskSpaceError before
    anything is written, CheckpointError for a failed write (what was written of it is removed), on every rank alike.
    """
    final = content.folder / f"{content.nimg:012d}"
    temporary = content.folder / f"{_TEMPORARY}{final.name}"
    if not team.on_rank_zero(lambda: _prepare(final, temporary, content.needed)):
        return final
    outcomes = team.all_gather(write_shards(temporary, team.rank, content.shards))
    files = {name: entry for written, _ in outcomes for name, entry in written.items()}
    errors = [error for _, error in outcomes if error]
    team.on_rank_zero(lambda: _finish(final, temporary, content.text, files, errors))
    team.on_rank_zero(lambda: _prune(final, content.keep, content.good))
    return final


def save(
    folder: Path | str, engine: Engine, *, nimg: int, state: dict[str, Any], keep: int, good: Collection[int] = ()
) -> Path:
    """`describe` and `write` in one, holding no more than a shard in memory."""
    content = describe(folder, engine, nimg=nimg, state=state, keep=keep, good=good)
    return write(content, Ranks(engine.rank, engine.world, engine.host_group))


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or damaged."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def suspects(folder: Path | str) -> list[Path]:
    """The checkpoints in a folder that were set aside, newest first."""
    found = [p for p in Path(folder).glob(f"{_SUSPECT}*") if p.name.removeprefix(_SUSPECT).isdecimal()]
    return sorted(found, reverse=True)


def set_aside(folder: Path | str, good: int | None) -> list[Path]:
    """Rename the checkpoints that are newer than the good one, or all where there is none; returns their new paths."""
    newer = [path for path in checkpoints(folder) if good is None or int(path.name) > good]
    moved = [path.with_name(f"{_SUSPECT}{path.name}") for path in newer]
    for path, aside in zip(newer, moved, strict=True):
        if aside.is_dir():
            shutil.rmtree(aside)
        path.rename(aside)
    return moved


def latest_valid(folder: Path | str, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest whole checkpoint in a run's own folder, or None. All ranks must call it and get the same answer.

    Damaged ones are named in a warning and passed over; what a crash left unfinished is removed, so nobody may be
    writing there. group: for host objects (`ZeroEngine.host_group`), None for the default one.
    """
    everyone(group).on_rank_zero(lambda: _tidy(Path(folder)))
    return _newest_whole(Path(folder), everyone(group))


def _newest_whole(folder: Path, team: Ranks) -> Path | None:
    for path in team.on_rank_zero(lambda: checkpoints(folder)):
        found = _all_damage(path, team)
        if not found:
            return path
        if team.rank == 0:
            log.warning("checkpoint %s is damaged and not used: %s", path, "; ".join(found))
    return None


def _all_damage(path: Path, team: Ranks) -> list[str]:
    found = team.all_gather(damage(path, team.rank, team.world))
    return list(dict.fromkeys(problem for part in found for problem in part))


def find(path: Path | str, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint a user means: a checkpoint itself, a checkpoints folder, or a run that has one (then the newest).

    All ranks must call it; nothing is changed there. Raises CheckpointError if there is none, or the one named is
    damaged.
    """
    path, team = Path(path), everyone(group)
    if (path / STATE).is_file() or (path / MANIFEST).is_file():
        if found := _all_damage(path, team):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(found)}")
        return path
    inner = path / CHECKPOINTS
    latest = _newest_whole(inner if inner.is_dir() else path, team)
    if latest is None:
        raise CheckpointError(f"{path} holds no valid checkpoint; give a run folder, or one of its checkpoints")
    return latest


def read_state(path: Path | str, kinds: dict[str, type] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint. kinds: what it must have beside its own, such as RUN.

    Raises CheckpointError for a format this version does not know, and for what is missing or of another type.
    """
    try:
        state = read_object(Path(path) / STATE)
        if state.get("format") != FORMAT:
            raise ValueError(f"it has format {state.get('format')}, and this version reads {FORMAT}")
        check_types(state, _OWN | (kinds or {}))
        check_types(state["optimizer"], dict.fromkeys(state["optimizer"], int))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {STATE}: {error}") from error
    return state


def load(path: Path | str, engine: Engine) -> dict[str, Any]:
    """Restore an engine of any world size and stage, in place; returns the checkpoint's state.

    Every rank reads all of it, one parameter at a time. Raises CheckpointError, before anything is changed, that lists
    every parameter, kind, buffer or counter that is missing, too many, or of another shape.
    """
    path, state = Path(path), read_state(path)
    with ExitStack() as stack:
        stored = open_shards(path, stack)
        _require_fit(path, stored, engine)
        _require_same(path, "counter", {*state["optimizer"]}, {*engine.scalars()})
        for name in engine.names():
            kinds = engine.kinds(name)
            engine.restore(name, {kind: stored[kind, name].get_tensor(f"{kind}/{name}") for kind in kinds})
        names = [name for kind, name in stored if kind == BUFFER]
        engine.restore_buffers({name: stored[BUFFER, name].get_tensor(f"{BUFFER}/{name}") for name in names})
    engine.load_scalars(state["optimizer"])
    return state


def ema_key(decay: float) -> str:
    """The key of an average, e.g. `ema_0.9999`: in a checkpoint, in an optimizer's state and for `--weights`."""
    return f"ema_{float(decay)!r}"


def _shards(engine: Engine) -> Iterator[dict[str, Tensor]]:
    """This rank's part of a checkpoint, cut into files. All ranks gather every parameter."""
    # of a CPU the tensors themselves come, which the next step changes
    pending = {f"{BUFFER}/{name}": b.clone() for name, b in engine.buffers().items()} if engine.rank == 0 else {}
    for number, name in enumerate(engine.names()):
        tensors = engine.gather(name, to=number % engine.world)
        pending |= {f"{kind}/{name}": tensor for kind, tensor in tensors.items()}
        if sum(t.nbytes for t in pending.values()) >= _SHARD_BYTES:
            yield pending
            pending = {}
    yield pending


def state_bytes(engine: Engine) -> int:
    """Of the float32 weights, moments and averages of all ranks."""
    return 4 * sum(math.prod(engine.shapes[name]) * len(engine.kinds(name)) for name in engine.names())


def _bytes_needed(engine: Engine) -> int:
    return state_bytes(engine) + sum(b.nbytes for b in engine.buffers().values()) + _SLACK_BYTES


def _prepare(final: Path, temporary: Path, needed: int) -> bool:
    """Make the temporary folder, if a checkpoint is to be written and there is room for it."""
    if final.is_dir() and not damage(final):
        return False
    final.parent.mkdir(parents=True, exist_ok=True)
    _tidy(final.parent)
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise DiskSpaceError(str(final.parent), needed, free)
    temporary.mkdir()
    return True


def _tidy(folder: Path) -> None:
    """Remove what crashes left unfinished."""
    for leftover in folder.glob(f"{_TEMPORARY}*") if folder.is_dir() else ():
        shutil.rmtree(leftover)


def _finish(final: Path, temporary: Path, text: str, files: Files, errors: list[str]) -> None:
    try:
        if errors:
            raise CheckpointError(f"checkpoint {final.name} was not written and has been removed: {'; '.join(errors)}")
        (temporary / STATE).write_text(text)
        write_manifest(temporary, {**files, STATE: seal(temporary / STATE)})
        if final.is_dir():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(final.parent)
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prune(newest: Path, keep: int, good: Collection[int]) -> None:
    """Delete checkpoints older than the newest, which was just written and is whole, down to `keep` with it."""
    older = [p for p in checkpoints(newest.parent) if int(p.name) < int(newest.name)]
    for path in older[keep - 1 :]:
        if int(path.name) in good:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", path, error)


def _require_fit(path: Path, stored: dict[tuple[str, str], Any], engine: Engine) -> None:
    """Raise CheckpointError unless a checkpoint has what the engine has, in the same shapes."""
    own = {(kind, name): tuple(engine.shapes[name]) for name in engine.names() for kind in engine.kinds(name)}
    own |= {(BUFFER, name): tuple(b.shape) for name, b in engine.buffers().items()}
    shapes = {key: shape_of(stored[key], *key) for key in own.keys() & stored.keys()}
    misshapen = [
        f"{kind} of {name} is {list(shape)} instead of {list(own[kind, name])}"
        for (kind, name), shape in shapes.items()
        if shape != own[kind, name]
    ]
    there, wanted = ({f"{kind} of {name}" for kind, name in keys} for keys in (stored, own))
    _require_same(path, "model", there, wanted, misshapen)


def _require_same(path: Path, what: str, there: set[str], wanted: set[str], misshapen: Collection[str] = ()) -> None:
    lists = {"missing": wanted - there, f"not in the {what}": there - wanted, "of another shape": misshapen}
    told = [f"{title}: {', '.join(sorted(items))}" for title, items in lists.items() if items]
    if told:
        raise CheckpointError(f"checkpoint {path} does not fit the {what}; {'; '.join(told)}")
