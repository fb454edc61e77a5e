"""What the numbers of a comparison say, under the questions that it is made for.

Every sentence is chosen by the numbers: a difference counts as one when each seed shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pixelgen_fast.compare.results import LATENTS, PIECES, PIXELS, Judged, Spread, Variant, seconds
from pixelgen_fast.compare.schema import PREPARED, Compare, prepared_folder
from pixelgen_fast.distill.schema import REPORT
from pixelgen_fast.eval.curves import read_metrics
from pixelgen_fast.runs.folder import RunFolder

Section = tuple[str, list[str]]


@dataclass(frozen=True)
class Ground:
    """What the variants are read against: the judge's report of real images, and those of what was trained first."""

    real: dict[str, Any]
    prepared: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, compare: Compare, real: dict[str, Any]) -> Ground:
        teacher, decoder = (prepared_folder(compare, what) for what in PREPARED)
        prepared = {}
        if (teacher / REPORT).is_file():
            prepared["teacher"] = json.loads((teacher / REPORT).read_text())
        if RunFolder(decoder).evaluation.is_file():
            report = json.loads(RunFolder(decoder).evaluation.read_text())["report"]
            rows = read_metrics(RunFolder(decoder).metrics)
            prepared["decoder"] = {**report, "seconds": seconds(rows, rows[-1]["nimg"])}
        return cls(real, prepared)

    def seconds(self, v: Variant) -> float:
        """Of training, with what was trained beforehand for it."""
        return v.seconds.mean + sum(self.prepared[what]["seconds"] for what in v.needs if what in self.prepared)


def read(variants: Sequence[Variant], ground: Ground) -> list[Section]:
    """The questions, each with what the numbers say."""
    base, others = variants[0], list(variants[1:])
    return [
        ("Can pixels be generated?", _pixels_can(variants, ground)),
        ("How far does it get, by images, time and parameters?", _how_far(variants)),
        ("How does it differ from generating a latent?", _against(base, variants, LATENTS, ground)),
        ("How does it differ from drawing piece by piece?", _against(base, variants, PIECES, ground)),
        ("Does alignment (REPA) help here?", [_alignment_helps(base, others)]),
        ("Does a lower alignment loss give better pixels?", [_lower_alignment(variants)]),
        ("What does each cost?", [_cost(base, others)]),
    ]


def versus(a: Spread, b: Spread, form: str) -> str:
    """How a quantity of one variant compares with another's, seed by seed."""
    lower = sum(x < y for x, y in zip(a.values, b.values, strict=True))
    higher = sum(x > y for x, y in zip(a.values, b.values, strict=True))
    n = len(a.values)
    means = f"{a.mean:{form}} against {b.mean:{form}}"
    if n == 1:
        return f"{means} with one seed"
    if n in (lower, higher):
        return f"{'lower' if lower else 'higher'} with every one of {n} seeds ({means})"
    return f"lower with {lower} and higher with {higher} of {n} seeds ({means}): no clear difference"


def quality(a: Variant, b: Variant) -> str:
    return (
        f"Fréchet distance {versus(a.frechet, b.frechet, '.1f')}; right class {versus(a.accuracy, b.accuracy, '.1%')}"
    )


def best(variants: Sequence[Variant]) -> Variant:
    return min(variants, key=lambda v: v.frechet.mean)


def fails(v: Variant) -> str:
    """Where a variant is wrong most often."""
    worst = sorted(v.by_class.items(), key=lambda pair: pair[1])[:2]
    if worst[-1][1] == 1:
        return f"{v.name} is never wrong" if worst[0][1] == 1 else f"{v.name} is wrong only at {worst[0][0]}"
    return f"{v.name} is wrong most often at " + " and ".join(f"{name} ({share:.0%} right)" for name, share in worst)


def _pixels_can(variants: Sequence[Variant], ground: Ground) -> list[str]:
    pixels = [v for v in variants if v.kind in (PIXELS, PIECES)]
    if not pixels:
        return ["No variant generates pixels."]
    known, apart = ground.real["classifier_accuracy"], ground.real["frechet_real"]
    as_good = [v.name for v in pixels if min(v.accuracy.values) >= known]
    first, last = best(pixels), max(pixels, key=lambda v: v.frechet.mean)
    return [
        f"Of {len(pixels)} systems that generate pixels, {len(as_good)} draw the class that was asked for at least as "
        f"often as the judge knows real images ({known:.1%}), with every seed"
        + (f": {', '.join(as_good)}." if as_good else "."),
        f"The lowest Fréchet distance is that of {first.name}, {first.frechet.text('.1f')}, the highest that of "
        f"{last.name}, {last.frechet.text('.1f')}; two halves of the real images are {apart:.1f} apart.",
        "; ".join(fails(v) for v in pixels) + ".",
    ]


def _how_far(variants: Sequence[Variant]) -> list[str]:
    said = []
    common = sorted(set.intersection(*({point.nimg for point in v.points} for v in variants)))
    if common:
        leaders = [(nimg, min(variants, key=lambda v: at(v, nimg).frechet.mean)) for nimg in common]
        parts = [f"after {n:,} images {v.name} has the lowest, {at(v, n).frechet.mean:.1f}" for n, v in leaders]
        said.append("By images, Fréchet distance: " + "; ".join(parts) + ".")
    quickest = min(variants, key=lambda v: v.seconds.mean)
    budget = quickest.seconds.mean
    within = [(point, v) for v in variants for point in v.points if point.seconds.mean <= budget]
    point, leader = min(within, key=lambda pair: pair[0].frechet.mean)
    said.append(
        f"By time: {quickest.name} is through first, in {budget:.0f} s; what had been judged by then was best with "
        f"{leader.name}, {point.frechet.mean:.1f} after {point.nimg:,} images."
    )
    return [*said, _by_parameters(variants)]


def at(v: Variant, nimg: int) -> Judged:
    return next(point for point in v.points if point.nimg == nimg)


def _by_parameters(variants: Sequence[Variant]) -> str:
    from scipy.stats import spearmanr

    if len(variants) < 3:
        return "By parameters: two systems do not tell."
    found = spearmanr([v.parameters for v in variants], [v.frechet.mean for v in variants])
    if not found.pvalue < 0.05:
        return (
            f"By parameters: no clear relation over {len(variants)} systems (Spearman's rank correlation of weights "
            f"and Fréchet distance {found.statistic:+.2f}, p = {found.pvalue:.2f})."
        )
    better = "larger" if found.statistic < 0 else "smaller"
    return (
        f"By parameters: {better} systems have the lower distance (Spearman's rank correlation {found.statistic:+.2f}, "
        f"p = {found.pvalue:.3f}, over {len(variants)} systems)."
    )


def _against(base: Variant, variants: Sequence[Variant], kind: str, ground: Ground) -> list[str]:
    """The variants of one kind against the first one, and against the best that draws pixels at once."""
    of_kind, plain = [v for v in variants if v.kind == kind], [v for v in variants if v.kind == PIXELS]
    if not of_kind or not plain:
        return ["There are none of both kinds here."]
    rivals = [base, *([best(plain)] if best(plain) is not base else [])]
    said = [f"{v.name} against {rival.name}: {quality(v, rival)}." for v in of_kind for rival in rivals]
    said.append("Where each fails: " + "; ".join(fails(v) for v in [*of_kind, *rivals]) + ".")
    if kind == LATENTS and (decoder := ground.prepared.get("decoder")):
        hides = decoder["distribution"]
        said.append(
            "What the decoder hides: real images that are encoded and decoded are a Fréchet distance of "
            f"{hides['frechet_generated']:.1f} from the real ones, and the judge finds their class in "
            f"{hides['share']:.1%}, at {decoder['psnr']:.1f} dB of each image: "
            "so would be latents that were drawn without a fault."
        )
    costs = [
        f"{v.name} {ground.seconds(v):.0f} s to train{_with(v)} and {v.draw_ms.text('.1f')} ms to draw an image"
        for v in [*of_kind, *rivals]
    ]
    return [*said, "What each costs here: " + "; ".join(costs) + "."]


def _with(v: Variant) -> str:
    return f" ({' and '.join(v.needs)} included)" if v.needs else ""


def _alignment_helps(base: Variant, others: Sequence[Variant]) -> str:
    plain = [v for v in others if v.alignment.values and v.parameters == base.parameters]
    if not plain:
        return f"No variant is {base.name} with nothing but an alignment added."
    return " ".join(f"{v.name} against {base.name}: {quality(v, base)}." for v in plain)


def _lower_alignment(variants: Sequence[Variant]) -> str:
    """Every two aligned variants, that with the lower alignment loss first."""
    aligned = sorted((v for v in variants if v.alignment.values), key=lambda v: v.alignment.mean)
    if len(aligned) < 2:
        return "Fewer than two variants have an alignment loss."
    said = [
        f"{a.name} against {b.name}: alignment loss {versus(a.alignment, b.alignment, '.3f')}; {quality(a, b)}."
        for a, b in combinations(aligned, 2)
    ]
    return " ".join(said)


def _cost(base: Variant, others: Sequence[Variant]) -> str:
    def cost(v: Variant) -> str:
        pairs = zip(base.images_per_second.values, v.images_per_second.values, strict=True)
        time = Spread(tuple(own / other for own, other in pairs)).text(".2f")
        draws = zip(v.draw_ms.values, base.draw_ms.values, strict=True)
        drawing = Spread(tuple(own / other for own, other in draws)).text(".2f")
        return (
            f"{v.name} {time} times its time an image in training, {drawing} times in drawing, "
            f"{v.parameters / base.parameters:.2f} times its weights"
        )

    return f"Against {base.name} on this machine, seed by seed: " + "; ".join(cost(v) for v in others) + "."
