"""Every name in the folder of a run, and of an exported model.

<run>/config.yaml          the resolved configuration            classes.json      names of the classes
      metrics.jsonl        a row an interval, its clock `nimg`   tensorboard/      the same
      pauses.jsonl         beside it: what shows a stop          checkpoints/      see checkpoint.py
      samples/             a grid of images now and then
      final.png, loss.png, report.html  at the end               dino/, ...        see kept.py
      owner.json           locked by the run that writes here, see owner.py
      wandb_id.txt         its id at Weights & Biases, where it is logged there
      evaluation.json      of `pixelgen evaluate`                generated/        of `pixelgen sample`
      sweep.json, .png     of its --sweep                        .evaluation-.../  of one that was stopped

<export>/model.safetensors or several (weight_files.py), config.json, dino/ or another thing that a model is built on
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# the training objective is what is saved, and the generator is its child of this name
MODEL = "model"
MODEL_PREFIX = f"{MODEL}."
CHECKPOINTS = "checkpoints"
WEIGHTS, ABOUT = "model.safetensors", "config.json"  # of an export
DIFFUSERS = "model_index.json"  # of an export for diffusers
PUBLISHED = "published"  # what a checkpoint and an export call the published weights that theirs began from
METRICS, EVALUATION, FINAL, LOSS = "metrics.jsonl", "evaluation.json", "final.png", "loss.png"
PAUSES = "pauses.jsonl"


def names_a_folder(name: object) -> bool:
    """Whether a class name from a file of somebody else is a folder's own name, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def classes(self) -> Path:
        return self.root / "classes.json"

    @property
    def metrics(self) -> Path:
        return self.root / METRICS

    @property
    def pauses(self) -> Path:
        """Of each row of metrics: seconds that were no training, and the image where its process began."""
        return self.root / PAUSES

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        return self.root / "wandb_id.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / CHECKPOINTS

    @property
    def final(self) -> Path:
        return self.root / FINAL

    @property
    def loss(self) -> Path:
        return self.root / LOSS

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def evaluation(self) -> Path:
        return self.root / EVALUATION

    @property
    def sweep(self) -> Path:
        return self.root / "sweep.json"

    @property
    def sweep_picture(self) -> Path:
        return self.sweep.with_suffix(".png")

    @property
    def generated(self) -> Path:
        return self.root / "generated"

    def samples(self, nimg: int) -> Path:
        """The grid that was drawn at an image of the run."""
        return self.root / "samples" / f"{nimg:012d}.png"
