"""What each command of the command line does: from its arguments to the rooms that do the work, and a line or two back.

Each returns its exit code. Heavy modules are imported by the command that needs them, so that help is at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from pixelgen_fast import config as cfg
from pixelgen_fast import errors, hub
from pixelgen_fast.runs.folder import RunFolder

if TYPE_CHECKING:
    from pixelgen_fast.engine.team import Team

_SAMPLING = [field.name for field in fields(cfg.Sampling)]


def train(args: argparse.Namespace) -> int:
    from pixelgen_fast import models

    config = cfg.load(args.config, args.overrides, models.model_schema)
    if args.dry_run:
        return dry_run(config)
    from pixelgen_fast.engine.heartbeat import Heartbeat

    with Heartbeat(config.run.rank_limit, config.run.stuck_limit) as heart:
        from pixelgen_fast.engine.trainer import Trainer

        return Trainer(config, heart).run()


def dry_run(config: cfg.Config) -> int:
    import torch
    from pixelgen_kernels.bodies import VARIABLE

    from pixelgen_fast import models
    from pixelgen_fast.data.roots import open_root
    from pixelgen_fast.engine.parallel import wrap_blocks
    from pixelgen_fast.engine.plan import describe, plan

    if config.run.resume is not None and not Path(config.run.resume).exists():
        raise cfg.ConfigError(f"run.resume is {config.run.resume}, and there is no such folder")
    with torch.device("meta"):
        model = models.build_model(config, config.data.num_classes or len(open_root(config.data.root).classes))
    wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=False)
    precision = config.train.precision
    if precision == "auto":
        precision = "fp32" if config.run.device == "cpu" else "bf16"
    print(cfg.to_yaml(config))
    print(describe(plan(model, config, precision), config, precision))
    if precision == "bf16" and os.environ.get(VARIABLE) != "native":  # which no GPU runs
        from pixelgen_fast.planning.command import hours_line

        print(hours_line(config))
    return 0


def plan(args: argparse.Namespace) -> int:
    from pixelgen_fast.planning.command import run

    return run(args)


def _together(work: Callable[[argparse.Namespace, Team], None], args: argparse.Namespace) -> int:
    """Do the work of a command with all ranks of the launcher, or alone."""
    from pixelgen_fast.engine.heartbeat import Heartbeat
    from pixelgen_fast.engine.team import Team

    with Heartbeat() as heart:
        work(args, Team(heart))
    return 0


def sample(args: argparse.Namespace) -> int:
    return _together(_sample, args)


def _sample(args: argparse.Namespace, team: Team) -> None:
    import torch

    from pixelgen_fast.runs import draw
    from pixelgen_fast.runs.drawn import DrawnFolder

    changes = _sampling(args)
    out = DrawnFolder(Path(args.out).expanduser() if args.out else RunFolder(_own_folder(args)).generated)
    team.first(lambda: out.check(args.overwrite))
    loaded = draw.load(args.run, args.weights, _device(args))
    chosen = _class_numbers(args.classes, loaded.classes)
    labels = torch.tensor(chosen).repeat_interleave(args.per_class)
    out.describe([loaded.classes[c] for c in chosen], args.per_class)
    team.first(out.begin)
    for numbers, images in loaded.batches(labels, **team.drawing(), **changes):
        out.write(numbers.tolist(), images.numpy())
    if shown := team.gather(out.shown):
        print(out.finish({number: image for part in shown for number, image in part.items()}))


def evaluate(args: argparse.Namespace) -> int:
    if not args.out:
        _own_folder(args)
    elif Path(args.out).expanduser().is_dir():
        raise errors.InputError(f"--out {args.out} is a folder; name a JSON file")
    from pixelgen_fast.decoding.judge import decoder_folder

    if (folder := decoder_folder(args.run)) is not None:
        return _evaluate_decoder(args, folder)
    if args.vgg is not None:
        raise errors.InputError(f"--vgg is of LPIPS, which judges decoders, and {args.run} holds none; leave it out")
    return _together(_evaluate, args)


def _evaluate_decoder(args: argparse.Namespace, folder: Path) -> int:
    from pixelgen_fast.decoding.judge import evaluate_decoder
    from pixelgen_fast.measure.evaluate import write_json
    from pixelgen_fast.processes import world_size

    of_drawing = [name for name in ("weights", "labels", "sweep", "dino", *_SAMPLING) if name != "batch"]
    given = [name for name in of_drawing if getattr(args, name) is not None]
    if given:
        raise errors.InputError(f"--{given[0]} is of drawing, and a decoder draws nothing of its own; leave it out")
    if (count := world_size(os.environ)) > 1:
        raise errors.InputError(f"{count} processes were started, and a decoder is judged by one: start it alone")
    report, settings = evaluate_decoder(
        folder,
        root=args.reference,
        count=args.samples,
        batch=args.batch or cfg.Sampling().batch,
        vgg=args.vgg,
        inception=args.inception,
        device=_device(args),
    )
    print(f"{args.run}: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    print("\n".join(report.lines()))
    out = Path(args.out).expanduser() if args.out else RunFolder(_own_folder(args)).evaluation
    write_json(out, {"settings": settings, "report": report.as_dict()})
    return 0


def _evaluate(args: argparse.Namespace, team: Team) -> None:
    from pixelgen_fast.measure import evaluate, sweep

    request = evaluate.Request(
        run=args.run,
        weights=args.weights,
        device=_device(args),
        changes=_sampling(args),
        samples=args.samples,
        labels=args.labels or evaluate.BALANCED,
        reference=args.reference,
        inception=args.inception,
        dino=args.dino,
        out=Path(args.out).expanduser() if args.out else None,
    )
    if args.sweep is not None:
        sweep.sweep(request, sweep.parse(args.sweep), team)
    else:
        evaluate.evaluate(request, team)


def teacher(args: argparse.Namespace) -> int:
    from pixelgen_fast.distill import schema, train

    print("\n".join(train.train(schema.load(args.config, args.overrides)).lines()))
    return 0


def decoder(args: argparse.Namespace) -> int:
    from pixelgen_fast.decoding import schema

    config = schema.load(args.config, args.overrides)
    from pixelgen_fast.engine.heartbeat import Heartbeat

    with Heartbeat(config.run.rank_limit, config.run.stuck_limit) as heart:
        from pixelgen_fast.decoding.train import DecoderTrainer

        return DecoderTrainer(config, heart).run()


def latents(args: argparse.Namespace) -> int:
    from pixelgen_fast.decoding import schema, statistics
    from pixelgen_fast.signals import REQUEUE

    said = statistics.compute(schema.load(args.config, args.overrides))
    print(said or "stopped by a signal; the same command goes on from here")
    return 0 if said else REQUEUE


def compare(args: argparse.Namespace) -> int:
    from pixelgen_fast.compare import run, schema
    from pixelgen_fast.signals import REQUEUE

    page = run.run(schema.load(args.config, args.overrides, quick=args.quick))
    if page is None:
        print("stopped by a signal; the same command goes on from here")
        return REQUEUE
    print(f"{page}, and {page.with_suffix('.md')}")
    return 0


def data_index(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.summary import summarise

    print("\n".join(summarise(args.root).lines()))
    return 0


def data_scan(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.scan import scan

    print("\n".join(scan(args.root, out=args.out, workers=args.workers).lines()))
    return 0


def data_pack(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.pack import pack

    print(pack(args.root, args.out, args.size, args.crop, upright=args.upright, workers=args.workers))
    return 0


def data_reference(args: argparse.Namespace) -> int:
    from pixelgen_fast.eval.features import FeatureNetworks
    from pixelgen_fast.eval.fid import write_statistics
    from pixelgen_fast.eval.reference import check_name

    out = Path(args.out).expanduser()
    check_name(out)
    if out.exists():
        raise errors.InputError(f"{out} exists; name another file or remove it")
    networks = FeatureNetworks(weights=args.inception, dino=args.dino, device=_device(args))
    found = write_statistics(args.root, out, networks, size=args.size, crop=args.crop, progress=True)
    print(f"{args.out}: {found.line()}; {found.about['extractor']}")
    return 0


def data_bench(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.bench import bench
    from pixelgen_fast.data.roots import open_root

    root, size, per_gpu = args.root, args.size, args.per_gpu
    if Path(root).suffix in (".yaml", ".yml"):
        from pixelgen_fast import models

        config = cfg.load(root, args.overrides, models.model_schema)
        root, size, per_gpu = config.data.root, size or config.data.image_size, per_gpu or _trained(config)
    elif args.overrides:
        raise errors.InputError(f"{args.overrides[0]}: overrides go with a configuration, and {root} is none")
    report = bench(
        open_root(root),
        size or 256,
        per_gpu=per_gpu or 450,
        cores=args.cores,
        turns=args.turns,
        seconds=args.seconds,
        images=args.images,
    )
    print("\n".join(report.lines()))
    return 0


def _trained(config: cfg.Config) -> float:
    """Images a second that one H100 should train: the share of its peak that was measured of the large models."""
    import torch

    from pixelgen_fast import models
    from pixelgen_fast.engine.metrics import GPU_PEAK, forward_flops

    with torch.device("meta"):
        model = models.build_model(config, config.data.num_classes or 1000)
    return 0.43 * GPU_PEAK["H100"] / (3 * forward_flops(model))


def kernels_report(args: argparse.Namespace) -> int:
    from pixelgen_kernels.report.command import main

    return main(args.arguments)


def kernels_build(args: argparse.Namespace) -> int:
    from pixelgen_kernels import build

    return build.main()


def kernels_warmup(args: argparse.Namespace) -> int:
    import torch
    from pixelgen_kernels.report.warmup import warmup

    from pixelgen_fast import models
    from pixelgen_fast.engine.launches import step_launches

    config = cfg.load(args.config, args.overrides, models.model_schema)
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    gpu = {}
    if torch.cuda.is_available():
        gpu["multiprocessors"] = torch.cuda.get_device_properties().multi_processor_count
    print(warmup(step_launches(config, precision, **gpu), Path(args.config).stem))
    return 0


def _own_folder(args: argparse.Namespace) -> Path:
    """Where a command writes that names no --out. Raises InputError for a repository of the hub."""
    if hub.is_hub_name(args.run):
        raise errors.InputError(f"{args.run}: is on the hub, where nothing is written: say where with --out")
    return Path(args.run)


def _device(args: argparse.Namespace) -> str:
    from pixelgen_fast.device import drawing_device

    return drawing_device(args.device)


def _sampling(args: argparse.Namespace) -> dict:
    """The options that were given. Raises ConfigError, naming the option, for one out of its range."""
    given = {name: getattr(args, name) for name in _SAMPLING}
    chosen = {k: tuple(v) if k == "interval" else v for k, v in given.items() if v is not None}
    cfg.check_sampling(cfg.Sampling(**chosen), "--")
    return chosen


def _class_numbers(names: list[str] | None, classes: list[str]) -> list[int]:
    if names is None:
        return list(range(min(10, len(classes))))
    for name in names:
        if name not in classes:
            raise errors.InputError(
                f"--classes {name}: no such class; there are {', '.join(classes[:20])}{' ...' * (len(classes) > 20)}"
            )
    return [classes.index(name) for name in names]
