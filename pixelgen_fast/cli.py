"""The command line: pixelgen train | sample | evaluate | export | import | teacher | compare | data | kernels.

An error is one line that says what to do; `--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from pixelgen_fast import config as cfg

EXIT_USAGE = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 refused, 75 stopped by a signal with everything saved."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in (_train, _compare) and not any(text.startswith("-") for text in rest):
        # argparse takes overrides only up to the first option: `train CONFIG --dry-run key=value` leaves them over.
        args.overrides += rest
    elif args.command is _kernels_report:
        args.arguments = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a progress bar in a log file is a line each time it moves
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(levelname)s %(message)s")
    try:
        return args.command(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"pixelgen: error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _train(args: argparse.Namespace) -> int:
    from pixelgen_fast.engine import generator

    config = cfg.load(args.config, args.overrides, generator.model_schema)
    if args.dry_run:
        return _dry_run(config)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from pixelgen_fast.engine.trainer import Trainer

    return Trainer(config).run()


def _dry_run(config: cfg.Config) -> int:
    import torch

    from pixelgen_fast.data.roots import open_root
    from pixelgen_fast.engine import generator, plan
    from pixelgen_fast.engine.parallel import wrap_blocks

    with torch.device("meta"):
        model = generator.build_model(config, config.data.num_classes or len(open_root(config.data.root).classes))
    wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=False)
    precision = config.train.precision
    if precision == "auto":
        precision = "fp32" if config.run.device == "cpu" else "bf16"
    print(cfg.to_yaml(config))
    print(plan.describe(plan.plan(model, config, precision), config, precision))
    return 0


def _sample(args: argparse.Namespace) -> int:
    import torch
    from PIL import Image
    from tqdm import tqdm

    from pixelgen_fast.engine import generator
    from pixelgen_fast.eval.grid import save_grid

    loaded = generator.load(args.run, args.weights, _device(args))
    chosen = _class_numbers(args.classes, loaded.classes)
    labels = torch.tensor(chosen).repeat_interleave(args.per_class)
    out = Path(args.out or Path(args.run) / "generated")
    images = loaded.draw(labels, progress=True, **_sampling(args))
    for number, image in enumerate(tqdm(images.numpy(), desc="write", unit="img")):
        folder = out / loaded.classes[int(labels[number])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    names = [loaded.classes[c] for c in chosen]
    grid = save_grid(images.numpy(), out / "grid.png", columns=args.per_class, row_titles=names)
    print(f"{len(images)} images in {out}, all of them on {grid}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from pixelgen_fast.engine import generator

    loaded = generator.load(args.run, args.weights, _device(args))
    digits = loaded.config.data.root == "digits"
    count = args.samples or (1000 if digits else 50_000)
    # Equal numbers of every class: random labels cost about 0.1 FID.
    labels = torch.arange(count) % len(loaded.classes)
    if not digits and args.reference is None:
        raise ValueError(
            "evaluating images other than the digits needs --reference, a folder of images or a statistics .npz"
        )
    if not digits:
        from pixelgen_fast.eval.fid import check_reference

        check_reference(args.reference, weights=args.inception)
    images = loaded.draw(labels, progress=True, **_sampling(args))
    if digits:
        from pixelgen_fast.eval.digits import evaluate_digits

        report = evaluate_digits(images, labels)
    else:
        from pixelgen_fast.eval.fid import evaluate_fid

        report = evaluate_fid(images, args.reference, weights=args.inception, device=_device(args), progress=True)
    settings = {
        k: getattr(loaded.config.sample, k) for k in ("steps", "solver", "guidance", "interval", "shift", "seed")
    }
    settings |= {k: v for k, v in _sampling(args).items() if k != "batch"} | {
        "weights": loaded.weights,
        "nimg": loaded.nimg,
    }
    print(f"{args.run}: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    print("\n".join(report.lines()))
    out = Path(args.out or Path(args.run) / "evaluation.json")
    out.write_text(json.dumps({"settings": settings, "report": report.as_dict()}, indent=2) + "\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    import torch

    from pixelgen_fast.engine import generator

    loaded = generator.load(args.run, args.weights)
    model = loaded.model.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    out = Path(args.out)
    generator.export(out, model.state_dict(), loaded.config, loaded.classes, loaded.weights, loaded.nimg)
    generator.load(out)
    print(f"{out}: model.safetensors ({loaded.weights}, {args.dtype}) and config.json, read back")
    return 0


def _import(args: argparse.Namespace) -> int:
    from pixelgen_fast import interop
    from pixelgen_fast.engine import generator

    published = interop.read_published(Path(args.file), args.system, args.weights)
    state, model, num_classes = interop.native(args.system, published)
    trained_at = interop.image_size(args.system, published)
    if None not in (trained_at, args.image_size) and trained_at != args.image_size:
        raise ValueError(f"--image-size {args.image_size}: {args.file} was made for {trained_at} pixels; leave it out")
    image_size = trained_at or args.image_size or 256
    values = {
        "model": vars(model),
        "data": {"image_size": image_size, "num_classes": num_classes, "root": "imported"},
        **interop.settings(args.system, model, image_size),
    }
    config = cfg.from_dict(values, generator.model_schema)
    generator.export(Path(args.out), state, config, [str(i) for i in range(num_classes)], args.weights, 0)
    generator.load(args.out)
    print(f"{args.out}: {len(state)} tensors of {args.file}; draw with pixelgen sample {args.out}")
    return 0


def _teacher(args: argparse.Namespace) -> int:
    from pixelgen_fast.engine.distill import schema, train

    print("\n".join(train.train(schema.load(args.config, args.overrides)).lines()))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pixelgen_fast.engine.compare import run, schema
    from pixelgen_fast.engine.signals import REQUEUE

    page = run.run(schema.load(args.config, args.overrides, quick=args.quick))
    if page is None:
        print("stopped by a signal; the same command goes on from here")
        return REQUEUE
    print(f"{page}, and {page.with_suffix('.md')}")
    return 0


def _data_scan(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.tools import scan

    print("\n".join(scan(args.root, out=args.out).lines()))
    return 0


def _data_pack(args: argparse.Namespace) -> int:
    from pixelgen_fast.data.tools import pack

    print(pack(args.root, args.out, size=args.size, crop=args.crop, upright=args.upright))
    return 0


def _kernels_report(args: argparse.Namespace) -> int:
    from pixelgen_kernels.report.command import main

    return main(args.arguments)


def _kernels_build(args: argparse.Namespace) -> int:
    from pixelgen_kernels import build

    return build.main()


def _kernels_warmup(args: argparse.Namespace) -> int:
    import torch
    from pixelgen_kernels.report.warmup import warmup

    from pixelgen_fast.engine import generator
    from pixelgen_fast.engine.launches import step_launches

    config = cfg.load(args.config, args.overrides, generator.model_schema)
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    gpu = {}
    if torch.cuda.is_available():
        gpu["multiprocessors"] = torch.cuda.get_device_properties().multi_processor_count
    print(warmup(step_launches(config, precision, **gpu), Path(args.config).stem))
    return 0


def _device(args: argparse.Namespace) -> str:
    """Where to draw. Raises ValueError where the operators that were asked for cannot run there."""
    import torch
    from pixelgen_kernels.bodies import choose_body

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    choose_body(torch.device(device).type)
    return device


def _sampling(args: argparse.Namespace) -> dict:
    chosen = {k: getattr(args, k) for k in ("steps", "solver", "guidance", "interval", "shift", "seed", "batch")}
    return {k: tuple(v) if k == "interval" else v for k, v in chosen.items() if v is not None}


def _class_numbers(names: list[str] | None, classes: list[str]) -> list[int]:
    if names is None:
        return list(range(min(10, len(classes))))
    for name in names:
        if name not in classes:
            raise ValueError(
                f"--classes {name}: no such class; there are {', '.join(classes[:20])}{' ...' * (len(classes) > 20)}"
            )
    return [classes.index(name) for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pixelgen", description="Train and use image generators that work on pixels.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by DeepSpeed's launcher")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: object, text: str, within: argparse._SubParsersAction = commands
    ) -> argparse.ArgumentParser:
        sub = within.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    train = command("train", _train, "Train, or go on with, the run that a configuration describes.")
    train.add_argument("config", help="YAML file, for example configs/digits.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, FLOPs and memory; allocate nothing"
    )

    sample = command("sample", _sample, "Draw images with a run or an exported model: PNG files by class, and a grid.")
    _add_model_arguments(sample)
    sample.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw (default: the first ten)")
    sample.add_argument("--per-class", type=int, default=8, help="images of each class (default: 8)")
    sample.add_argument("--out", help="folder to write (default: RUN/generated)")

    evaluate = command(
        "evaluate", _evaluate, "Measure generated images: accuracy and Fréchet distance of digits, FID of others."
    )
    _add_model_arguments(evaluate)
    evaluate.add_argument("--samples", type=int, help="images to draw (default: 1000 digits, 50000 others)")
    evaluate.add_argument("--reference", help="real images (folder), or their statistics (.npz), for FID")
    evaluate.add_argument("--inception", help="local file of torch-fidelity's Inception weights")
    evaluate.add_argument("--out", help="JSON file to write (default: RUN/evaluation.json)")

    export = command(
        "export", _export, "Write weights as safetensors with a configuration, ready for sample and for run.init."
    )
    export.add_argument("run", help="run folder or checkpoint")
    export.add_argument("out", help="folder to write")
    export.add_argument("--weights", help="ema (default), raw, or one of several averages such as ema_0.9999")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")

    imported = command("import", _import, "Convert a published checkpoint to the form that export writes.")
    imported.add_argument(
        "file", help="as published; weights keep their licence, NVIDIA's for PixelDiT is NSCLv1 (non-commercial)"
    )
    imported.add_argument("out", help="folder to write")
    imported.add_argument("--system", required=True, choices=("pixeldit", "jit", "deco"))
    imported.add_argument("--image-size", type=int, help="pixels a side (default: as the weights tell, or 256)")
    imported.add_argument("--weights", choices=("ema", "ema2", "raw"), default="ema", help="ema2: JiT's second average")

    teacher = command("teacher", _teacher, "Train a small teacher for feature alignment on the images themselves.")
    teacher.add_argument("config", help="YAML file, for example configs/teacher_digits.yaml")
    teacher.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file"
    )

    compare = command("compare", _compare, "Train and judge several systems on the same images; write a page of it.")
    compare.add_argument("config", help="YAML file, for example configs/compare_digits.yaml")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    compare.add_argument("--quick", action="store_true", help="the file's short version, to see every part run")

    data = commands.add_parser("data", help="Check or pack a data set.").add_subparsers(
        required=True, metavar="COMMAND"
    )
    scan = command("scan", _data_scan, "Decode every image and report classes, sizes and unreadable files.", data)
    scan.add_argument("root", help="data.root of a configuration")
    scan.add_argument("--out", help="JSON file to write")
    pack = command("pack", _data_pack, "Crop and resize a data set once, into a form that needs no decoding.", data)
    pack.add_argument("root", help="data.root of a configuration")
    pack.add_argument("out", help="folder to write")
    pack.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    pack.add_argument(
        "--crop", choices=("adm", "squash"), default="adm", help="centre crop, or squeeze the whole image"
    )
    pack.add_argument(
        "--upright", action="store_true", help="turn images as their EXIF orientation says (ADM does not)"
    )

    kernels = commands.add_parser("kernels", help="Judge or prepare the kernels.")
    kernels = kernels.add_subparsers(required=True, metavar="COMMAND")
    text = "Compile every kernel for an H100 that is not there, say what it costs, and --gate it."
    command("report", _kernels_report, f"{text} Options: python -m pixelgen_kernels.report --help", kernels)
    command("build", _kernels_build, "Compile the CPU operators in csrc for this machine's PyTorch.", kernels)
    warm = command(
        "warmup", _kernels_warmup, "Compile ahead, on this GPU, all kernels that a configuration needs.", kernels
    )
    warm.add_argument("config", help="YAML file")
    warm.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, checkpoint, or exported folder")
    parser.add_argument("--weights", help="ema (default), raw, or one of several averages such as ema_0.9999")
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--solver", choices=("euler", "heun", "adams2"))
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times between which guidance acts"
    )
    parser.add_argument("--shift", type=float, help="time shift; above 1 spends more steps near the noise")
    parser.add_argument("--seed", type=int, help="seed of the initial noise")
    parser.add_argument("--batch", type=int, help="images drawn at once; does not change them")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


if __name__ == "__main__":
    sys.exit(main())
