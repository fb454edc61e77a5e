"""The command line: pixelgen train | plan | sample | evaluate | report | export | push | import | data | ...

An error is one line that says what to do; `--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import get_args

from pixelgen_fast import commands, errors, exchange, launcher, processes, watching
from pixelgen_fast.output import losable_output
from pixelgen_fast.settings import Solver
from pixelgen_fast.signals import REQUEUE, StopAtOnce, Stopped

# what an option of whole numbers may be, whichever command has it; those of drawing have their range in `Sampling` too
_RANGES = {
    "per_class": (1, 100_000),
    "samples": (2, 100_000_000),
    "steps": (1, 100_000),
    "image_size": (1, 16_384),
    "size": (1, 16_384),
    "layers": (0, 1_000),
    "gpus": (1, 1_000_000),
    "nodes": (1, 1_000_000),
    "port": (0, 65_535),
    "workers": (0, 1_024),
    "cores": (1, 1_024),
    "turns": (1, 1_000),
    "images": (1, 100_000_000),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0 done; 2 an error to mend, in one line; 69 a rank is lost, which the line names; 70 a fault of the program, with
    its traceback; 75 stopped by a signal with everything saved that there was.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overridable = (
        commands.train,
        commands.plan,
        commands.compare,
        exchange.import_published,
        commands.data_bench,
        watching.profile,
    )
    if args.command in overridable and not any(text.startswith("-") for text in rest):
        # argparse takes overrides only up to the first option: `train CONFIG --dry-run key=value` leaves them over.
        args.overrides += rest
    elif args.command is commands.kernels_report:
        args.arguments = rest
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a progress bar in a log file is a line each time it moves
    errors.begin(False)
    with losable_output(), StopAtOnce():
        try:
            code = _run(args)
        except Stopped as stopped:
            print(errors.stopped_line(str(stopped)), file=sys.stderr)
            code = REQUEUE
    launcher.leave(code)
    processes.end_if_a_thread_waits(code)
    return code


def _run(args: argparse.Namespace) -> int:
    """Do what the arguments say; an error becomes a line and an exit code."""
    try:
        _check_numbers(args)
        _check_processes(args)
        rank = int(os.environ.get("RANK", "0"))
        logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(levelname)s %(message)s")
        return args.command(args)
    except Exception as error:
        code = errors.exit_code(error)
        if args.debug or code == errors.FAULT:
            traceback.print_exc()
        print(errors.line(error), file=sys.stderr)
        return code


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError for an option of whole numbers that is not in its range."""
    for name, (low, high) in _RANGES.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, int) and not low <= value <= high:
                option = f"--{name.replace('_', '-')}"
                raise errors.InputError(f"{option} is {value}; it must be from {low:,} to {high:,}")


def _check_processes(args: argparse.Namespace) -> None:
    """Name this process where it is one of several. Raises InputError for a command that works in one."""
    if args.command in (commands.train, commands.decoder, commands.sample, commands.evaluate):
        if args.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        if (said := processes.join(os.environ)) and os.environ["RANK"] == "0":
            print(said)
    elif (count := processes.world_size(os.environ)) > 1:
        raise errors.InputError(
            f"{count} processes were started (torchrun, srun), and this command works in one process: start it alone"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pixelgen", description="Train and use image generators that work on pixels.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by DeepSpeed's launcher")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: object, text: str, within: argparse._SubParsersAction = verbs
    ) -> argparse.ArgumentParser:
        sub = within.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    train = command(
        "train",
        commands.train,
        "Train, or go on with, the run that a configuration describes.",
    )
    train.add_argument("config", help="YAML file, for example configs/digits.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, FLOPs and memory; allocate nothing"
    )

    _add_plan_arguments(command("plan", commands.plan, "What a run would need on GPUs: time, memory, energy."))

    sample = command(
        "sample", commands.sample, "Draw images with a run or an exported model: PNG files by class, and a grid."
    )
    _add_model_arguments(sample)
    sample.add_argument("--classes", nargs="+", metavar="NAME", help="classes to draw (default: the first ten)")
    sample.add_argument("--per-class", type=int, default=8, help="images of each class (default: 8)")
    sample.add_argument("--out", help="folder to write (default: RUN/generated)")
    sample.add_argument("--overwrite", action="store_true", help="replace what an earlier sample wrote there")

    evaluate = command(
        "evaluate",
        commands.evaluate,
        "Measure generated images (FID, sFID, IS, precision, recall, FD-DINOv2; digits by class), a decoder by PSNR.",
    )
    _add_model_arguments(evaluate)
    evaluate.add_argument("--samples", type=int, help="images to draw (default: 1000 digits, 50000 others)")
    evaluate.add_argument(
        "--labels", choices=("balanced", "random"), help="classes in equal numbers (default), or drawn at random"
    )
    evaluate.add_argument(
        "--sweep", nargs="*", metavar="KEY=A,B", help="measure every combination, as guidance=1,1.5 weights=ema,raw"
    )
    evaluate.add_argument(
        "--reference", help="real images, or a .npz that `data reference` or ADM made; what a decoder is to decode"
    )
    evaluate.add_argument("--vgg", help="of LPIPS, for a decoder: file of torchvision's VGG-16, or none for no LPIPS")
    evaluate.add_argument("--out", help="JSON file to write (default: RUN/evaluation.json)")

    _add_network_arguments(evaluate)

    export = command(
        "export",
        exchange.export,
        "Write weights as safetensors with a configuration, ready for sample and run.init; a decoder as published.",
    )
    export.add_argument("run", help="run folder or checkpoint")
    export.add_argument("out", help="folder to write")
    export.add_argument("--weights", help="ema (default), raw, or one of several averages such as ema_0.9999")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    export.add_argument(
        "--format",
        choices=("folder", "public", "diffusers"),
        default="folder",
        help="public: one file, OUT, as the code of ditdh, raev2, mar, fractal or alitok reads it; diffusers: a folder "
        "that it opens without pixelgen_fast, of pixeldit or jit",
    )
    _add_shard_size(export)

    push = command("push", exchange.push, "Put a run's or an export's weights on the Hugging Face Hub, with a card.")
    push.add_argument("run", help="run folder, checkpoint, or exported folder")
    push.add_argument("repo", help="OWNER/NAME there; made where there is none")
    push.add_argument("--weights", help="ema (default), raw, or one of several averages such as ema_0.9999")
    push.add_argument("--dtype", choices=("fp32", "bf16"), help="default: as the weights are")
    push.add_argument("--format", choices=("folder", "diffusers"), default="folder", help="as of export")
    push.add_argument("--license", help="of your weights, as the hub calls it: apache-2.0, cc-by-nc-4.0, ...")
    push.add_argument("--private", action="store_true", help="a repository that is made is private")
    push.add_argument("--out", help="folder to write what would be pushed to, and push nothing")
    _add_shard_size(push)

    imported = command(
        "import", exchange.import_published, "Convert a published checkpoint to the form that export writes."
    )
    imported.add_argument(
        "file", help="as published; weights keep their licence, NVIDIA's for PixelDiT is NSCLv1 (non-commercial)"
    )
    imported.add_argument("out", help="folder to write")
    imported.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings, as model.encoder of latents")
    imported.add_argument(
        "--system",
        required=True,
        help="pixeldit, jit, deco, ditdh, raev2, fractal, mar or alitok; or rae_decoder",
    )
    imported.add_argument("--image-size", type=int, help="pixels a side (default: as the weights tell, or 256)")
    imported.add_argument("--weights", choices=("ema", "ema2", "raw"), help="ema2: JiT's second average")
    imported.add_argument("--tokenizer", help="AliTok's tokenizer, AliTok.pth, which the model draws images with")
    imported.add_argument("--encoder", help="of a rae_decoder: timm's network (default: DINOv2-B with registers)")
    imported.add_argument(
        "--encoder-weights", help="its file, in timm's, Meta's or Hugging Face's names (default: hub)"
    )
    imported.add_argument("--layers", type=int, nargs="+", help="blocks whose mean is the latent, for RAEv2's decoder")

    for name, function, text, example in (
        ("teacher", commands.teacher, "Train a small teacher for feature alignment on the images.", "teacher_digits"),
        ("decoder", commands.decoder, "Train, or go on with, the decoder of an encoder's latents.", "decoder_digits"),
        ("latents", commands.latents, "Mean and variance of an encoder's latents over a data set.", "decoder_digits"),
    ):
        program = command(name, function, text)
        program.add_argument("config", help=f"YAML file, for example configs/{example}.yaml")
        program.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file"
        )

    compare = command(
        "compare", commands.compare, "Train and judge several systems on the same images; write a page of it."
    )
    compare.add_argument("config", help="YAML file, for example configs/compare_digits.yaml")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    compare.add_argument("--quick", action="store_true", help="the file's short version, to see every part run")

    report = command("report", watching.report, "Write a page of a run: settings, curves, grids, time, evaluation.")
    report.add_argument("run", help="run folder, at any time of its training")
    report.add_argument("--out", help="HTML file to write (default: RUN/report.html)")

    profile = command(
        "profile", watching.profile, "Profile the training step of a configuration, by part of the model."
    )
    profile.add_argument("config", help="YAML file, for example configs/digits.yaml")
    profile.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file"
    )
    profile.add_argument("--steps", type=int, default=3, help="steps under the profiler (default: 3)")
    profile.add_argument("--synthetic", action="store_true", help="random pixels instead of the run's data")
    profile.add_argument("--out", help="folder to write (default: profiles/NAME of the configuration)")
    demo = command("demo", watching.demo, "Serve a page that draws with a run or an exported model, or with two.")
    demo.add_argument("runs", nargs="+", metavar="RUN", help="run folders, checkpoints, or exported folders")
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    demo.add_argument("--port", type=int, default=8008, help="port to listen at; 0: one that is free (default: 8008)")
    demo.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")

    _add_data_commands(verbs.add_parser("data", help="Index, check, pack or time a data set."), command)

    kernels = verbs.add_parser("kernels", help="Judge or prepare the kernels.")
    kernels = kernels.add_subparsers(required=True, metavar="COMMAND")
    text = "Compile every kernel for an H100 that is not there, say what it costs, and --gate it."
    command("report", commands.kernels_report, f"{text} Options: python -m pixelgen_kernels.report --help", kernels)
    command(
        "build",
        commands.kernels_build,
        "Compile the CPU operators in csrc for this machine's PyTorch.",
        kernels,
    )
    warm = command(
        "warmup",
        commands.kernels_warmup,
        "Compile ahead, on this GPU, all kernels that a configuration needs.",
        kernels,
    )
    warm.add_argument("config", help="YAML file")
    warm.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    return parser


def _add_data_commands(data: argparse.ArgumentParser, command: Callable[..., argparse.ArgumentParser]) -> None:
    verbs = data.add_subparsers(required=True, metavar="COMMAND")
    index = command(
        "index",
        commands.data_index,
        "Say what a data set is and what its index costs; tar files are indexed once, so that a run starts at once.",
        verbs,
    )
    index.add_argument("root", help="data.root of a configuration")
    scan = command(
        "scan",
        commands.data_scan,
        "Decode every image and report classes, sizes and unreadable files; compare a packed folder's checksums.",
        verbs,
    )
    scan.add_argument("root", help="data.root of a configuration")
    scan.add_argument("--out", help="JSON file to write")
    pack = command(
        "pack",
        commands.data_pack,
        "Crop and resize a data set once, into a form that needs no decoding; the same command goes on after a kill.",
        verbs,
    )
    pack.add_argument("root", help="data.root of a configuration")
    pack.add_argument("out", help="folder to write")
    pack.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    pack.add_argument(
        "--crop", choices=("adm", "squash"), default="adm", help="centre crop, or squeeze the whole image"
    )
    pack.add_argument(
        "--upright", action="store_true", help="turn images as their EXIF orientation says (ADM does not)"
    )
    reference = command(
        "reference",
        commands.data_reference,
        "Write what images are compared with: moments of features and some features, with crop, count and checksum.",
        verbs,
    )
    reference.add_argument("root", help="data.root of a configuration")
    reference.add_argument("out", help="file to write, .npz")
    reference.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    reference.add_argument("--crop", choices=("adm", "none"), default="adm", help="centre crop, or only this size")
    reference.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    _add_network_arguments(reference)
    bench = command(
        "bench",
        commands.data_bench,
        "Images a second of a core: the loader, torchvision, PIL and DALI's own reader on the same files, in turns.",
        verbs,
    )
    bench.add_argument("root", help="data.root of a configuration, or a configuration, a YAML file")
    bench.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    bench.add_argument("--size", type=int, help="pixels a side (default: the configuration's, or 256)")
    bench.add_argument(
        "--per-gpu", type=float, help="images a second that a GPU trains (default: as the model tells, or 450)"
    )
    bench.add_argument(
        "--cores", type=int, nargs="+", default=[1, 2], help="of these, those that there are (default: 1 2)"
    )
    bench.add_argument("--turns", type=int, default=5, help="of each on each number of cores (default: 5)")
    bench.add_argument("--seconds", type=float, default=1.0, help="of a turn (default: 1)")
    bench.add_argument("--images", type=int, default=1024, help="of the data set, drawn at random (default: 1024)")
    for parser in (scan, pack):
        parser.add_argument("--workers", type=int, help="processes (default: one for each core; 0: none beside this)")


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard-size", default="5GB", help="of a file of weights; more go into several (default: 5GB)")


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inception", help="local file of torch-fidelity's Inception weights")
    parser.add_argument("--dino", help="local file of DINOv2 ViT-L/14, for FD-DINOv2")


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, for example configs/imagenet256_38ep.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    parser.add_argument(
        "--gpu",
        default="h100",
        help="h100 (default), h200, a100, b200, l40s or 4090; or a JSON file of gpu, tflop_per_s, tb_per_s (measured)",
    )
    parser.add_argument("--nodes", type=int, help="nodes that they are on (default: eight GPUs each)")
    parser.add_argument("--json", metavar="FILE", help="file to write")
    parser.add_argument("--html", metavar="FILE", help="page with charts to write")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, checkpoint, or exported folder; hub:OWNER/NAME on the hub")
    parser.add_argument("--weights", help="ema (default), raw, or one of several averages such as ema_0.9999")
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--solver", choices=get_args(Solver))
    parser.add_argument("--guidance", type=float, help="guidance, away from the null class or --guide; 1 is none")
    parser.add_argument("--guide", help="run or exported folder whose model guidance leads away from")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times between which guidance acts"
    )
    parser.add_argument("--shift", type=float, help="time shift; above 1 spends more steps near the noise")
    parser.add_argument("--temperature", type=float, help="scale of the noise of sequential systems; 1 as trained")
    parser.add_argument("--passes", type=int, help="passes of a masked system for an image")
    parser.add_argument("--end", type=float, help="time at which the flow is left, before the shift")
    parser.add_argument("--seed", type=int, help="seed of the initial noise")
    parser.add_argument("--batch", type=int, help="images drawn at once; what several processes share out")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


if __name__ == "__main__":
    sys.exit(main())
