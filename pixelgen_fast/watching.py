"""The commands that look at a run: `pixelgen report`, a page of how it went; `pixelgen demo`, a page to draw with it;
`pixelgen profile`, where the time and memory of its step go.

Like those of commands.py, each returns its exit code, and imports what is heavy by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pixelgen_fast import config as cfg
from pixelgen_fast import errors
from pixelgen_fast.runs.folder import RunFolder


def report(args: argparse.Namespace) -> int:
    from pixelgen_fast.pages.run import write_report

    folder = RunFolder(Path(args.run).expanduser())
    if not folder.root.is_dir():
        raise errors.InputError(f"{args.run}: no such folder; give the folder of a run")
    out = Path(args.out).expanduser() if args.out else None
    if out is not None and out.is_dir():
        raise errors.InputError(f"{out} is a folder; --out names an HTML file")
    print(write_report(folder, _defaults(folder), out))
    return 0


def profile(args: argparse.Namespace) -> int:
    from pixelgen_fast import models
    from pixelgen_fast.profiling.run import run

    config = cfg.load(args.config, args.overrides, models.model_schema)
    out = Path(args.out).expanduser() if args.out else Path("profiles") / Path(args.config).stem
    print("\n".join(run(config, out, args.steps, args.synthetic)))
    return 0


def demo(args: argparse.Namespace) -> int:
    from pixelgen_fast.device import drawing_device
    from pixelgen_fast.pages.demo import Demo
    from pixelgen_fast.pages.server import Server
    from pixelgen_fast.signals import Stopped

    with Server(Demo(args.runs, drawing_device(args.device)), args.host, args.port) as server:
        print(f"{server.address}: draw there; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except Stopped:
            print("ended")
    return 0


def _defaults(folder: RunFolder) -> dict[str, Any] | None:
    """The defaults of the configuration of a run, a generator's or a decoder's; None for one of another version."""
    from pixelgen_fast import models
    from pixelgen_fast.decoding import schema
    from pixelgen_fast.pages.settings import defaults_of

    if not folder.config.is_file():
        return None
    for load in (lambda path: cfg.load(path, (), models.model_schema), lambda path: schema.load(path, ())):
        try:
            return defaults_of(load(folder.config))
        except cfg.ConfigError:
            continue
    return None
