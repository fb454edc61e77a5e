"""What `pixelgen push` does: an export with its card and pictures, put into a repository of the hub.

<repository>/README.md                  the card                 final.png, loss.png    of the run, where it has them
             model.safetensors, ...     as runs/export.py or share/diffusers.py write it
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pixelgen_fast import hub
from pixelgen_fast.runs.export import export
from pixelgen_fast.runs.folder import RunFolder
from pixelgen_fast.share.card import card, evaluation, front_matter
from pixelgen_fast.share.diffusers import export_diffusers

if TYPE_CHECKING:
    from pixelgen_fast.runs.draw import Generator

FOLDER, DIFFUSERS = "folder", "diffusers"
# weights of an earlier push that this one may have no more
_REPLACED = {FOLDER: ["model*.safetensors*"], DIFFUSERS: ["transformer/*.safetensors*"]}


def write(generator: Generator, run: Path, repo: str, out: Path, kind: str, limit: int, licence: str | None) -> str:
    """Fill a new or empty folder with what is pushed; returns a line that says what is in it.

    run: where the generator comes from. kind: FOLDER or DIFFUSERS. limit: bytes of a file of weights. licence: the
    hub's identifier for the weights. Raises InputError, before anything is written, for what cannot be.
    """
    g = generator
    front_matter(g, licence)
    if kind == DIFFUSERS:
        export_diffusers(out, g, limit)
    else:
        export(out, g.model.state_dict(), g.config, g.classes, g.weights, g.nimg, g.published, limit)
    pictures = _pictures(run, out)
    text = card(g, run, repo, licence, pictures, _opening(repo, g.classes[0], kind))
    (out / "README.md").write_text(text, encoding="utf-8")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    judged = (
        "its last evaluation" if evaluation(g, run)[1] else "no numbers, for there is no evaluation of these weights"
    )
    return f"{', '.join(files)}; the card has {judged}"


def push(folder: Path, repo: str, kind: str, nimg: int, private: bool) -> str:
    """Put the folder that `write` filled into a repository; returns the commit's address. Raises HubError."""
    return hub.upload(
        folder,
        repo,
        private=private or None,
        message=f"Weights of pixelgen_fast after {nimg:,} images",
        replacing=_REPLACED[kind],
    )


def _pictures(run: Path, out: Path) -> list[str]:
    """Copy the run's pictures, where it has them. Returns their names."""
    folder = RunFolder(run)
    there = [path for path in (folder.final, folder.loss) if path.is_file()]
    for path in there:
        shutil.copyfile(path, out / path.name)
    return [path.name for path in there]


def _opening(repo: str, example: str, kind: str) -> str:
    """How images are drawn from the repository."""
    if kind == DIFFUSERS:
        return (
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo}", custom_pipeline="{repo}", trust_remote_code=True)\n'
            f"images = pipe([{example!r}] * 8, seed=0).images\n```"
        )
    return f"```bash\npixelgen sample hub:{repo} --classes {shlex.quote(example)} --out images\n```"
