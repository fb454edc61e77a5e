"""Build of pixelgen_fast. Tool settings are in pyproject.toml; the extras are listed here.

csrc is compiled against the PyTorch that is installed, so install with `pip install --no-build-isolation` after torch.
Without torch or a compiler at hand the package installs all the same, runs its reference operators on a CPU, and says
so; `pixelgen kernels build` compiles csrc later.
"""

import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "pixelgen_fast" / "__init__.py").read_text())[1]

EXTRAS = {
    # one of the two, by the CUDA major version of the installed torch; both run on a machine without a GPU
    "cuda13": ["nvidia-dali-cuda130>=2.1"],
    "cuda12": ["nvidia-dali-cuda120>=2.1"],
    "flash": ["flash-attn>=2.8"],
    "xformers": ["xformers>=0.0.35"],
    "eval": ["torch-fidelity>=0.4"],
    "log": ["tensorboard", "wandb"],
    "parquet": ["pyarrow"],
    "hub": ["huggingface_hub>=1.0"],
    "teacher": ["timm>=1.0.20", "torchvision", "peft>=0.17"],
    "decoder": ["timm>=1.0.20", "torchvision", "lpips>=0.1.4"],
    "dev": [
        "torch-fidelity>=0.4",
        "torchvision",
        "tensorboard",
        "pyarrow",
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "import-linter>=2",
        "scipy",
        "playwright",  # drives the chromium that is there; without one its tests are left out
        "timm>=1.0.20",
        "peft>=0.17",
        "lpips>=0.1.4",
        "huggingface_hub>=1.0",
        "diffusers>=0.35",
    ],
}


def numpy_requirement() -> str:
    """The interpreter of Triton 3.6, which runs the kernels on a CPU, fails with numpy 2.4 and later.

    No marker speaks of another package's version. Triton comes with torch, which is there before this package is.
    """
    try:
        old = tuple(map(int, installed("triton").split(".")[:2])) < (3, 7)
    except PackageNotFoundError:
        old = False
    return "numpy<2.4" if old else "numpy"


class BuildNative(build_ext):
    """Compile csrc with pixelgen_kernels/build.py, into the package, or beside its sources for an editable install."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        builder = runpy.run_path(str(HERE / "kernels" / "pixelgen_kernels" / "build.py"))
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            builder["build"](out)
        except (ImportError, builder["BuildError"]) as error:
            print(f"warning: csrc was not compiled, CPU operators run their reference: {error}", file=sys.stderr)


setup(
    name="pixelgen_fast",
    version=VERSION,
    description="Training engine for image generators that work directly on pixels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["pixelgen_fast*"]), *find_packages("kernels"), "pixelgen_kernels.csrc"],
    package_dir={"pixelgen_kernels": "kernels/pixelgen_kernels", "pixelgen_kernels.csrc": "csrc"},
    package_data={
        "pixelgen_fast": ["py.typed", "pages/files/*", "planning/*.json"],
        "pixelgen_kernels": ["py.typed", "tuned/*.json"],
        "pixelgen_kernels.csrc": ["*.cpp", "*.h"],
    },
    ext_modules=[Extension("pixelgen_kernels._native", sources=["csrc/native.cpp"], optional=True)],
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        numpy_requirement(),
        "einops>=0.8",
        "deepspeed>=0.19",
        "omegaconf>=2.4",
        "pyyaml",
        "safetensors>=0.5",
        "pillow",
        "tqdm",
        "scikit-learn>=1.4",
        "matplotlib",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["pixelgen = pixelgen_fast.cli:main"],
        "torchrun.handlers": ["pixelgen = pixelgen_fast.launcher:plug_in"],
    },
)
