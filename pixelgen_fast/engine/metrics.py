"""Where the numbers of a run go: console, metrics.jsonl, TensorBoard and, if asked, Weights & Biases. Rank 0 writes.

model FLOP/s = images/s x FLOPs of a training image (forward counted by operator, 2 per multiply-add, times 3), and its
share of the device's peak: the data sheet's dense bf16 rate of a GPU, or the float32 matrix-multiply rate of this CPU,
measured when the run starts.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast.atomic import replaced
from pixelgen_fast.engine.ceilings import MatrixPeak
from pixelgen_fast.engine.rows import RowFile
from pixelgen_fast.models.system import BaseSystem
from pixelgen_fast.runs.folder import RunFolder

log = logging.getLogger(__name__)

# Dense bf16 FLOP/s of the SXM or standard part, from NVIDIA's data sheets.
GPU_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}


def forward_flops(model: BaseSystem) -> int:
    """FLOPs of one image's forward pass, counted by operator on shapes alone: nothing is computed."""
    # of a model that is there, fake tensors stand for weights and results
    there = not next(model.parameters()).is_meta
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True) if there else nullcontext()
    with shapes_only, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.trial(1)
    return counter.get_total_flops()


def device_peak(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, what it is) of the device; nan for a GPU that is not in the table."""
    if device.type == "cpu":
        return MatrixPeak(1024).measure(6), f"fp32 matrix products on {torch.get_num_threads()} threads, measured"
    name = torch.cuda.get_device_name(device)
    for key, peak in GPU_PEAK.items():
        if key in name:
            return peak, f"dense bf16 of {name}, data sheet"
    return float("nan"), f"unknown for {name}"


def memory_used(device: torch.device) -> int:
    """Peak bytes of this process so far: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Sums the time that a device spends in `with stopwatch:`. Only `take` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.begin: float | torch.cuda.Event = 0.0
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self.begin = self._mark()

    def __exit__(self, *error: object) -> None:
        if self.on_gpu:
            self.spans.append((self.begin, self._mark()))
        else:
            self.seconds += self._mark() - self.begin

    def take(self) -> float:
        """Seconds since the last `take`."""
        if self.spans:
            self.spans[-1][1].synchronize()
        seconds = self.seconds + sum(a.elapsed_time(b) for a, b in self.spans) / 1000
        self.seconds, self.spans = 0.0, []
        return seconds

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Metrics:
    """Sinks of one run. On ranks other than 0 every method does nothing.

    Rows of metrics.jsonl show neither a stop nor a pause, but in rates: what does is in pauses.jsonl.
    """

    def __init__(self, folder: RunFolder, rank: int, nimg: int, total: int, config: cfg.Config | None = None) -> None:
        """config: of the run, for the loggers; None: there are none."""
        self.active = rank == 0
        self.bar = tqdm(
            total=total,
            initial=nimg,
            unit="img",
            unit_scale=True,
            desc=folder.root.name,
            disable=not self.active,
            smoothing=0.05,
        )
        if not self.active:
            return
        self.beside: dict[str, str] = {}
        _drop_rows_after(folder.metrics, nimg)
        self.rows = RowFile(folder.metrics, self.say)
        _drop_rows_after(folder.pauses, nimg)
        self.pauses = RowFile(folder.pauses, lambda text: None)  # what fails, the rows beside it say
        self.folder, self.writer = folder, None
        self.tensorboard = bool(config and config.log.tensorboard)
        self._open_tensorboard(nimg)
        self.wandb = _wandb_run(folder, config) if config and config.log.wandb_project else None
        self.wandb_failed = False

    def advance(self, images: int) -> None:
        self.bar.update(images)

    def write(self, row: dict[str, float | int | None], pauses: dict[str, float | int] | None = None) -> None:
        """Record a row, of training or of validation; `nimg` is its clock. loss is None when no step of the interval
        had a finite one. pauses: what shows a stop, or took time that is no training's."""
        if not self.active:
            return
        self.rows.append(row)
        pauses = pauses or {}
        if pauses:
            self.pauses.append({"nimg": row["nimg"], **pauses})
        if "loss" in row:
            loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
            self.beside["loss"] = f"loss {loss}, {row['images_per_second']:.1f} img/s"
        else:
            self.beside["validation"] = f"validation {row['validation_loss']:.4f}"
        self.bar.set_postfix_str(", ".join(self.beside.values()), refresh=False)
        self._write_tensorboard({**row, **pauses})
        self._write_wandb({**row, **pauses})

    def _open_tensorboard(self, nimg: int) -> None:
        if self.tensorboard and self.writer is None:
            self.writer = _summary_writer(self.folder, nimg)
            self.tensorboard = self.writer is not None

    def _write_tensorboard(self, row: dict[str, float | int | None]) -> None:
        """A row that TensorBoard's files have no room for is lost there and said, and the next one is tried again."""
        try:
            self._open_tensorboard(row["nimg"])
            if self.writer:
                for name, value in row.items():
                    if value is not None:
                        self.writer.add_scalar(name, value, row["nimg"])
        except OSError as error:
            self.writer = None
            self.say(f"TensorBoard has no row of image {row['nimg']:,}, the run goes on: {error}")

    def _write_wandb(self, row: dict[str, float | int | None]) -> None:
        """A row that Weights & Biases does not take is lost there, and said once."""
        if not self.wandb:
            return
        try:
            self.wandb.log(row)
        except Exception as error:  # its errors are of many kinds, and metrics.jsonl has the row
            if not self.wandb_failed:
                self.say(f"Weights & Biases has no row of image {row['nimg']:,}, the run goes on: {error}")
            self.wandb_failed = True
        else:
            self.wandb_failed = False

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        if self.active:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.active:
            self.rows.close()
            self.pauses.close()
            if self.writer:
                with suppress(OSError):  # metrics.jsonl has the same rows
                    self.writer.close()
            if self.wandb:
                with suppress(Exception):
                    self.wandb.finish()


def _drop_rows_after(path: Path, nimg: int) -> None:
    """A resumed run repeats what came after its checkpoint; rows of the first time would show twice."""
    if not path.exists():
        return
    whole = path.read_bytes()
    rows = b"".join(row + b"\n" for row in whole.split(b"\n") if _row_nimg(row) <= nimg)
    if whole.startswith(rows):
        os.truncate(path, len(rows))  # a full disk allows that
    else:
        with replaced(path) as work:
            work.write_bytes(rows)


def _row_nimg(line: bytes) -> float:
    try:
        return float(json.loads(line)["nimg"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the last line of a killed run may be half written, or another file's bytes


def _summary_writer(folder: RunFolder, nimg: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("log.tensorboard is on but tensorboard is not installed; pip install pixelgen_fast[log]")
        return None
    return SummaryWriter(str(folder.tensorboard), purge_step=nimg + 1)  # the row of nimg itself stays


def _wandb_run(folder: RunFolder, config: cfg.Config) -> Any:
    try:
        import wandb

        return wandb.init(
            project=config.log.wandb_project, name=folder.root.name, dir=str(folder.root), config=cfg.to_dict(config),
            resume="allow", id=_wandb_id(folder),
        )  # fmt: skip
    except Exception as error:  # a logger must never cost a run; the local records go on
        log.warning("log.wandb_project: Weights & Biases did not start, the run goes on without it: %s", error)
        return None


def _wandb_id(folder: RunFolder) -> str:
    """The run's own id, kept in its folder: two folders of one name are two runs, and a resumed run is one."""
    if folder.wandb_id.is_file() and (kept := folder.wandb_id.read_text().strip()):
        return kept
    new = secrets.token_hex(6)
    with replaced(folder.wandb_id) as work:
        work.write_text(new + "\n")
    return new
