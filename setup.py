"""Build of pixelgen_fast. Tool settings are in pyproject.toml; the extras are listed here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

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
    "teacher": ["timm>=1.0.20", "torchvision", "peft>=0.17"],
    "dev": [
        "torch-fidelity>=0.4",
        "torchvision",
        "tensorboard",
        "pytest>=8",
        "pytest-xdist",
        "ruff",
        "import-linter>=2",
        "scipy",
    ],
}

setup(
    name="pixelgen_fast",
    version=VERSION,
    description="Training engine for image generators that work directly on pixels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["pixelgen_fast*"]), "pixelgen_kernels"],
    package_dir={"pixelgen_kernels": "kernels/pixelgen_kernels"},
    package_data={"pixelgen_fast": ["py.typed"], "pixelgen_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "einops>=0.8",
        "deepspeed>=0.19",
        "omegaconf>=2.4",
        "safetensors>=0.5",
        "pillow",
        "tqdm",
        "scikit-learn>=1.4",
        "matplotlib",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["pixelgen = pixelgen_fast.cli:main"]},
)
