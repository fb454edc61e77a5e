"""The card of a model on the hub: README.md, written from its run.

What the run left is quoted with the settings that it was made with; what it did not leave is not spoken of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.curves import read_metrics, with_measured
from pixelgen_fast.eval.digits import DigitsReport
from pixelgen_fast.eval.fid import FidReport
from pixelgen_fast.interop.licences import Licence, of_network, of_published
from pixelgen_fast.runs.folder import FINAL, LOSS, RunFolder
from pixelgen_fast.runs.plain import read_object

if TYPE_CHECKING:
    from pixelgen_fast.runs.draw import Generator

_SECTIONS = ("model", "data", "objective", "alignment", "optimizer", "train", "sample")


def card(generator: Generator, run: Path, repo: str, licence: str | None, pictures: Iterable[str], opening: str) -> str:
    """The text of a card.

    run: the folder that may hold metrics.jsonl and evaluation.json. licence: the hub's identifier of what the owner
    grants, None for none. pictures: those of FINAL and LOSS that lie beside the card. opening: how it is drawn from.
    Raises InputError for a licence where the weights have one already.
    """
    g, size = generator, generator.config.data.image_size
    parameters = sum(p.numel() for p in g.model.parameters())
    kinds = "one class" if len(g.classes) == 1 else f"{len(g.classes):,} classes"
    head = (
        f"A {g.config.model.system} of {parameters:,} parameters that draws images of {size} x {size} pixels of "
        f"{kinds}, trained with pixelgen_fast. Weights: `{g.weights}`, after {g.nimg:,} images."
    )
    parts = [f"# {repo.split('/')[-1]}", head]
    if FINAL in pictures:
        parts.append(f"![Samples, a row for each class]({FINAL})")
    parts += ["## Draw", opening, *_numbers(g, run), "## Training", _training(g, run)]
    if LOSS in pictures:
        parts.append(f"![Training curve]({LOSS})")
    parts += ["## Licence", _licences(g, licence), "## Configuration", _configuration(g)]
    front = yaml.safe_dump(front_matter(g, licence), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n" + "\n\n".join(parts) + "\n"


def front_matter(generator: Generator, licence: str | None) -> dict[str, Any]:
    """What the hub reads of a card. Raises InputError as `card` does."""
    system, several = generator.config.model.system, len(generator.classes) > 1
    tags = ["pixelgen_fast", system, "image-generation", *(["class-conditional"] if several else [])]
    begun = [of_published(name) for name in generator.published]
    if begun and licence is not None:
        raise InputError(
            f"--license {licence}: these weights began as {begun[0].of}, whose licence stays: {begun[0].name}; leave "
            "--license out"
        )
    values: dict[str, Any] = {}
    if licence is not None:
        values["license"] = licence
    elif holds := strictest([*begun, *contained(generator)]):
        values["license"] = holds.id or "unknown"
        if holds.id == "other":
            values |= {"license_name": holds.name.lower().replace(" ", "-"), "license_link": holds.link}
    values |= {"library_name": "pixelgen_fast", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    return values


def contained(generator: Generator) -> list[Licence]:
    """The licences of networks of others that lie in the folder beside the model's own weights."""
    model = generator.config.model
    used = [part for part in model.built_on if part.used(model)]
    found = [of_network(part.network_of(model)) for part in used]
    found += [of_published(part.published)._replace(of=f"the {part.name}") for part in used if part.published]
    return [licence for licence in found if licence is not None]


def strictest(licences: list[Licence]) -> Licence | None:
    """That of several which allows least: none at all, not commercial, one of its own, an open one."""
    order = {None: 0, "cc-by-nc-4.0": 1, "other": 2}
    return min(licences, key=lambda found: order.get(found.id, 3), default=None)


def _licences(g: Generator, licence: str | None) -> str:
    lines = [f"- {of_published(name).line()}. These weights began from them and keep it." for name in g.published]
    if g.published:
        return "\n".join([*lines, *_parts(g)])
    own = f"The weights: `{licence}`." if licence else "Its owner has not said under which licence the weights are."
    return "\n".join([own, *_parts(g)])


def _parts(g: Generator) -> list[str]:
    teacher = g.config.alignment.teacher
    lines = [f"- Contained, where its weights are the published ones: {found.line()}." for found in contained(g)]
    model = g.config.model
    if any("decoder" in part.places(model, Path()) for part in model.built_on):
        lines.append("- The decoder in `autoencoder/` is under the licence of where it came from.")
    if teacher is not None:
        lines.append(f"- Its tokens were drawn towards those of `{teacher}` in training, which is not contained.")
    return lines


def _numbers(g: Generator, run: Path) -> list[str]:
    """The last evaluation, where it is of these weights."""
    settings, lines = evaluation(g, run)
    if not lines:
        return []
    drawn = ", ".join(f"{name} {_short(value)}" for name, value in settings.items() if value is not None)
    return ["## Numbers", f"Of `pixelgen evaluate`, drawn with {drawn}:", "\n".join(["```", *lines, "```"])]


def evaluation(g: Generator, run: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings, report in words) of a run's evaluation.json; no words where it is of other weights, or there is none.

    A file that another version wrote, whose report has other parts, counts as none.
    """
    try:
        found = read_object(RunFolder(run).evaluation)
        settings, report = found["settings"], found["report"]
        kind = FidReport if "fid" in report else DigitsReport
        if (settings["weights"], settings["nimg"]) == (g.weights, g.nimg):
            return settings, kind(**report).lines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}, []


def _training(g: Generator, run: Path) -> str:
    c, shown = g.config, ", ".join(g.classes[:10]) + (", ..." if len(g.classes) > 10 else "")
    rows = {
        "data": f"`{Path(c.data.root).name}`, {c.data.image_size} pixels, {len(g.classes):,} classes: {shown}",
        "images seen": f"{g.nimg:,}, {c.train.global_batch} a step",
        "objective": f"predicts {c.objective.predict}, loss on {c.objective.loss}, path {c.objective.path}",
        "optimizer": f"{c.optimizer.name}, learning rate {c.optimizer.lr:g}, {c.optimizer.schedule}; "
        f"averages {_short(c.optimizer.ema)}",
    }
    try:
        last = with_measured(read_metrics(RunFolder(run).metrics))[-1]
        rows["last row of the log"] = f"image {last['nimg']:,}, loss {_short(last['loss'])}"
    except (OSError, ValueError, KeyError):
        pass
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _configuration(g: Generator) -> str:
    """The sections that decide what the model is, without the places of a machine."""
    values = json.loads(json.dumps(asdict(g.config)))
    sections = {name: values[name] for name in _SECTIONS}
    text = yaml.safe_dump(_without_places(sections), sort_keys=False, allow_unicode=True)
    return f"<details>\n\n```yaml\n{text}```\n\n</details>"


def _without_places(values: Any) -> Any:
    """Settings, of each path its last name alone."""
    match values:
        case dict():
            return {name: _without_places(value) for name, value in values.items()}
        case list():
            return [_without_places(value) for value in values]
        case str() if "/" in values:
            return Path(values).name
    return values


def _short(value: Any) -> str:
    """A number with the digits that a reader takes in; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
