"""Packaging of megatron-muon."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

_VERSION: dict[str, str] = {}
exec((ROOT / "megatron_muon" / "version.py").read_text(), _VERSION)

TRAINING = [
    "matplotlib>=3.8",  # loss plots
    "sentencepiece>=0.2",  # the tokenizer of the example
    "tqdm>=4.66",  # progress bars
]

setup(
    name="megatron-muon",
    version=_VERSION["__version__"],
    description="Muon for Megatron-Core: --optimizer muon under tensor, pipeline, data and expert parallelism",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_muon", "megatron_muon.*"]),
    package_data={"megatron_muon.monitor": ["page.html"], "megatron_muon.planning": ["devices.json"]},
    # Megatron-LM with our git patches finds the plug-in by this.
    entry_points={"megatron_core.plugins": ["megatron_muon = megatron_muon.plugin:load"]},
    install_requires=[
        "emerging-optimizers>=0.3,<0.4",
        "megatron-core>=0.19,<0.20",
        "packaging>=24.2",
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it without requiring it
        "torch>=2.6",
    ],
    extras_require={
        "training": TRAINING,
        "dev": [
            *TRAINING,
            "multi-storage-client>=1.3",  # object stores, which Megatron-Core reads with it and does not require
            "einops>=0.8",  # megatron-core's Mamba mixer imports it without requiring it
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
        ],
    },
)
