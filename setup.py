"""Package definition. ``kernels/`` and ``pruning/`` reach the package through two links inside ``effitrain/``."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.8",
    "transformers>=5.0",
    "safetensors>=0.4",
    "bitsandbytes>=0.46; platform_system == 'Linux'",
    "triton>=3.3; platform_system == 'Linux'",
    "datasets>=4.0",
    "torch-pruning>=1.5",
    "tqdm>=4.66",
    "pydantic>=2.6",
    "click>=8.1",
    "rich>=13",
    "pyyaml>=6",
    "packaging>=23",
    "huggingface_hub>=0.30",
    "matplotlib>=3.8",
]
TEST = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "peft>=0.17",
    "accelerate",
    "ruff",
    "mypy",
    "types-PyYAML",
]

setup(
    name="effitrain",
    version="0.1.0",
    description="Adapt a language model far larger than your GPU, exactly within a memory budget you name.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["effitrain*"]),
    package_data={
        "effitrain": ["py.typed"],
        "effitrain.kernels": ["tiles.json"],
        "effitrain.presets": ["*.toml", "tiny/*", "tiny_data/*"],
    },
    install_requires=CORE,
    extras_require={"test": TEST, "peft": ["peft>=0.17"], "track": ["tensorboard", "wandb"]},
    entry_points={"console_scripts": ["effitrain = effitrain.cli.main:main"]},
)
