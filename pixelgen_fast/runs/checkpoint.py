"""Checkpoints that know neither world size nor ZeRO stage, and are either whole or not there.

    <run>/checkpoints/000000012800/            the clock: images seen
        rank00000-000.safetensors ...          tensors `<kind>/<parameter>`, kind = master, exp_avg, exp_avg_sq,
                                               ema_<decay>; and `buffer/<name>`. Rank i mod W writes parameter i
        state.json                             format, nimg, optimizer counters, versions, and what the trainer gives
        manifest.json                          size and CRC-32 of every other file; written last

A checkpoint is assembled under a temporary name, synced to disk and renamed, so a crash at any moment leaves the
earlier ones as they were. CRC-32 (zlib, some 3 GB/s a core) finds truncation and flipped bits, not tampering.

This file does not import DeepSpeed: sampling and export read checkpoints without it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelgen_fast.errors import UserError
from pixelgen_fast.runs.folder import CHECKPOINTS

FORMAT = 1
STATE, MANIFEST = "state.json", "manifest.json"
MASTER, BUFFER = "master", "buffer"
_TEMPORARY = "tmp-"
_SHARD_BYTES = 2**30
_SLACK_BYTES = 2**20

log = logging.getLogger(__name__)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, found or read; nothing that was on disk before has changed."""


class DiskSpaceError(CheckpointError):
    """There is no room for a checkpoint. Training can go on and try again. `needed` and `free` are in bytes."""

    def __init__(self, folder: str, needed: int, free: int) -> None:
        super().__init__(folder, needed, free)
        self.folder, self.needed, self.free = folder, needed, free

    def __str__(self) -> str:
        return f"a checkpoint in {self.folder} needs {self.needed} bytes and {self.free} are free; make room there"


class Engine(Protocol):
    """What is saved and restored: `pixelgen_fast.engine.zero.ZeroEngine`, or anything that offers the same."""

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


def save(folder: Path | str, engine: Engine, *, nimg: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of image `nimg` into `folder`, then delete all but the newest `keep`. All ranks must call.

    state: JSON types only, the same on every rank; stored beside `format`, `nimg`, `optimizer` (its counters), `stage`,
    `world` and `versions`.
    A valid checkpoint of the same nimg is left as it is; a damaged one is replaced. Returns the path. Raises
    DiskSpaceError before anything is written, CheckpointError for a failed write (what was written of it is
    removed), on every rank alike; ValueError for keep < 1; TypeError for a state that is not plain.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    folder = Path(folder)
    final, temporary = folder / f"{nimg:012d}", folder / f"{_TEMPORARY}{nimg:012d}"
    own = {"format": FORMAT, "nimg": nimg, "optimizer": engine.scalars(), "stage": engine.stage, "world": engine.world}
    own["versions"] = {name: metadata.version(name) for name in ("torch", "deepspeed", "safetensors")}
    text = json.dumps({**state, **own}, indent=1)

    if not _on_rank_zero(engine, lambda: _prepare(final, temporary, _bytes_needed(engine))):
        return final
    outcomes = _all_gather(engine, _write_shards(temporary, engine))
    files = {name: entry for written, _ in outcomes for name, entry in written.items()}
    errors = [error for _, error in outcomes if error]
    _on_rank_zero(engine, lambda: _finish(final, temporary, text, files, errors))
    _on_rank_zero(engine, lambda: _prune(folder, final, keep))
    return final


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or damaged."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def damage(path: Path | str, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a checkpoint, by its manifest; empty if nothing. Ranks of a world share the files out."""
    path = Path(path)
    try:
        files = sorted(json.loads((path / MANIFEST).read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error!r})"]
    return [problem for name, entry in files[rank::world] if (problem := _damage(path / name, entry))]


def _damage(file: Path, entry: Any) -> str:
    """What is wrong with a file by its entry in the manifest. What cannot be read is damaged, not the end of a run."""
    name = file.name
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if _crc32(file) != entry["crc32"]:
            return f"{name} has another checksum than when it was written"
    except (OSError, KeyError, TypeError) as error:
        return f"{name} cannot be checked ({error!r})"
    return ""


def latest_valid(folder: Path | str, group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest whole checkpoint in a folder, or None. All ranks must call it and get the same answer.

    Damaged ones are named in a warning and passed over; what a crash left unfinished is removed. group: a process
    group for host objects (`ZeroEngine.host_group`), None for the default one.
    """
    team = _Team(group)
    for path in _on_rank_zero(team, lambda: _tidy(Path(folder))):
        found = [problem for part in _all_gather(team, damage(path, team.rank, team.world)) for problem in part]
        if not found:
            return path
        if team.rank == 0:
            log.warning("checkpoint %s is damaged and not used: %s", path, "; ".join(dict.fromkeys(found)))
    return None


def find(path: Path | str, group: dist.ProcessGroup | None = None) -> Path:
    """The checkpoint a user means: a checkpoint itself, a checkpoints folder, or a run that has one (then the newest).

    All ranks must call it. Raises CheckpointError if there is none, or the one named is damaged.
    """
    path = Path(path)
    if (path / STATE).is_file() or (path / MANIFEST).is_file():
        team = _Team(group)
        found = [problem for part in _all_gather(team, damage(path, team.rank, team.world)) for problem in part]
        if found:
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(dict.fromkeys(found))}")
        return path
    inner = path / CHECKPOINTS
    latest = latest_valid(inner if inner.is_dir() else path, group)
    if latest is None:
        raise CheckpointError(f"{path} holds no valid checkpoint; give a run folder, or one of its checkpoints")
    return latest


def read_state(path: Path | str) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError for a format this version does not know."""
    state = json.loads((Path(path) / STATE).read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state['format']}, and this version reads {FORMAT}")
    return state


def load(path: Path | str, engine: Engine) -> dict[str, Any]:
    """Restore an engine of any world size and stage, in place; returns the checkpoint's state.

    Every rank reads all of it, one parameter at a time. Raises CheckpointError, before anything is changed, that lists
    every parameter, kind or buffer that is missing, too many, or of another shape.
    """
    path, state = Path(path), read_state(path)
    with ExitStack() as stack:
        index = _open(path, stack)
        buffers = index.pop(BUFFER, {})
        stored = {(kind, name): f for kind, files in index.items() for name, f in files.items()}
        wanted = {(kind, name) for name in engine.names() for kind in engine.kinds(name)}
        shapes = {key: tuple(stored[key].get_slice("/".join(key)).get_shape()) for key in wanted & stored.keys()}
        _require_same(
            path,
            missing=[f"{kind} of {name}" for kind, name in wanted - stored.keys()],
            extra=[f"{kind} of {name}" for kind, name in stored.keys() - wanted],
            misshapen=[
                f"{kind} of {name} is {list(shape)} instead of {list(engine.shapes[name])}"
                for (kind, name), shape in shapes.items()
                if shape != tuple(engine.shapes[name])
            ],
        )
        own = engine.buffers().keys()
        _require_same(path, missing=[*own - buffers.keys()], extra=[*buffers.keys() - own], misshapen=[])
        for name in engine.names():
            keys = {kind: f"{kind}/{name}" for kind in engine.kinds(name)}
            engine.restore(name, {kind: stored[kind, name].get_tensor(key) for kind, key in keys.items()})
        engine.restore_buffers({name: f.get_tensor(f"{BUFFER}/{name}") for name, f in buffers.items()})
    engine.load_scalars(state["optimizer"])
    return state


def ema_key(decay: float) -> str:
    """The key of an average, e.g. `ema_0.9999`: in a checkpoint, in an optimizer's state and for `--weights`."""
    return f"ema_{float(decay)!r}"


def read_weights(path: Path | str, kind: str) -> dict[str, Tensor]:
    """Full fp32 CPU weights and buffers of a checkpoint, without an engine.

    kind: "raw" (what was trained), or "ema_<decay>" of an average that was kept. A parameter that
    was trained but not averaged is given raw. Raises CheckpointError if the checkpoint has no such average.
    """
    path = Path(path)
    with ExitStack() as stack:
        index = _open(path, stack)
        averages = sorted((k for k in index if k.startswith("ema_")), key=lambda k: float(k.removeprefix("ema_")))
        if kind != "raw" and kind not in averages:
            raise CheckpointError(f"checkpoint {path} has no weights {kind!r}; it has {['raw', *averages]}")
        files = {name: (MASTER, f) for name, f in index[MASTER].items()}
        if kind != "raw":
            files |= {name: (kind, f) for name, f in index[kind].items()}
        files |= {name: (BUFFER, f) for name, f in index.get(BUFFER, {}).items()}
        return {name: f.get_tensor(f"{key}/{name}") for name, (key, f) in files.items()}


class _Team:
    """The processes that answer together, where there is no engine to say so."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.host_group = group
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def _on_rank_zero(team: Engine | _Team, function: Callable[[], Any]) -> Any:
    """function() as rank 0 finds it, on every rank; its failure likewise."""
    outcome: Any = None
    if team.rank == 0:
        try:
            outcome = function()
        except CheckpointError as error:
            outcome = error
        except OSError as error:
            outcome = CheckpointError(f"checkpoint failed: {error}")
    if team.world > 1:
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=team.host_group)
        outcome = box[0]
    if isinstance(outcome, CheckpointError):
        raise outcome
    return outcome


def _all_gather(team: Engine | _Team, value: Any) -> list[Any]:
    if team.world == 1:
        return [value]
    everyone: list[Any] = [None] * team.world
    dist.all_gather_object(everyone, value, group=team.host_group)
    return everyone


def _bytes_needed(engine: Engine) -> int:
    values = sum(_numel(engine.shapes[name]) * len(engine.kinds(name)) for name in engine.names())
    return 4 * values + sum(b.nbytes for b in engine.buffers().values()) + _SLACK_BYTES


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


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


def _tidy(folder: Path) -> list[Path]:
    """Remove what crashes left unfinished; return the checkpoints, newest first."""
    for leftover in folder.glob(f"{_TEMPORARY}*") if folder.is_dir() else ():
        shutil.rmtree(leftover)
    return checkpoints(folder)


def _write_shards(temporary: Path, engine: Engine) -> tuple[dict[str, dict[str, int]], str | None]:
    """Write this rank's parameters: ({file: manifest entry}, error). A rank that fails still gathers with the rest."""
    written: dict[str, dict[str, int]] = {}
    error: str | None = None
    pending = {f"{BUFFER}/{name}": b for name, b in engine.buffers().items()} if engine.rank == 0 else {}
    names = engine.names()
    for number, name in enumerate(names):
        owner = number % engine.world
        tensors = engine.gather(name, to=owner)
        if error:
            continue
        pending |= {f"{kind}/{name}": tensor for kind, tensor in tensors.items()}
        full = number == len(names) - 1 or sum(t.nbytes for t in pending.values()) >= _SHARD_BYTES
        if pending and full:
            file = temporary / f"rank{engine.rank:05d}-{len(written):03d}.safetensors"
            try:
                save_file(pending, file)
                written[file.name] = _sealed(file)
            except (OSError, SafetensorError) as failure:
                error = f"rank {engine.rank} could not write {file.name}: {failure}"
            pending = {}
    return written, error


def _finish(final: Path, temporary: Path, text: str, files: dict[str, dict[str, int]], errors: list[str]) -> None:
    try:
        if errors:
            raise CheckpointError(f"checkpoint {final.name} was not written and has been removed: {'; '.join(errors)}")
        (temporary / STATE).write_text(text)
        files = {**files, STATE: _sealed(temporary / STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.is_dir():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(final.parent)
    except (OSError, CheckpointError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete checkpoints older than the newest, which was just written and is whole, down to `keep` with it."""
    older = [p for p in checkpoints(folder) if int(p.name) < int(newest.name)]
    for path in older[keep - 1 :]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", path, error)


def _open(path: Path, stack: ExitStack) -> dict[str, dict[str, Any]]:
    """{kind: {name: open file}} of every tensor in a checkpoint."""
    index: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in sorted(path.glob("*.safetensors")):
        opened = stack.enter_context(safe_open(file, framework="pt"))
        for key in opened.keys():  # noqa: SIM118  (a safetensors file is not a dict)
            kind, name = key.split("/", 1)
            index[kind][name] = opened
    return index


def _require_same(path: Path, *, missing: list[str], extra: list[str], misshapen: list[str]) -> None:
    lists = {"missing": missing, "not in the model": extra, "of another shape": misshapen}
    told = [f"{what}: {', '.join(sorted(items))}" for what, items in lists.items() if items]
    if told:
        raise CheckpointError(f"checkpoint {path} does not fit the model; {'; '.join(told)}")


def _sealed(file: Path) -> dict[str, int]:
    """Bring a file to disk and describe it for the manifest."""
    _sync(file)
    return {"bytes": file.stat().st_size, "crc32": _crc32(file)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum
