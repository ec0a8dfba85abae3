"""Packaging of megatron-iml.

`kernels/` ships as `megatron_iml.kernels` through a committed symlink, never as a top-level package:
PyPI's `kernels` (Hugging Face's kernel hub) owns that name, and a second copy breaks its users.
"""

from setuptools import find_namespace_packages, setup

setup(
    name="megatron-iml",
    version="0.1.0",
    description="A Megatron-style trainer that turns instruction benchmarks into an instruction-tuned OPT",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megatron_iml", "megatron_iml.*"]),
    package_data={"megatron_iml.data": ["sources/*.yaml", "taxonomy/*.yaml"]},
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "gigatoken>=0.10",
        "tokenizers>=0.20",
        "orjson>=3.9",
        "jinja2>=3.1",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "rouge-score>=0.1.2",
        "nltk>=3.9",
        "psutil>=5.9",
    ],
    extras_require={
        # Where torch does not bring its own (CPU builds): the interpreter tests of kernels/ need it.
        "triton": ["triton>=3.6,<3.10"],
        "demo": ["reasoning-gym>=0.1.25"],
        "parquet": ["pyarrow>=15"],
        "hf": ["transformers>=4.46", "safetensors>=0.4"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "setuptools>=77",
        ],
    },
)
