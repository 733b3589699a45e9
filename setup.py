import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TENSORBOARD = ["tensorboard>=2.15"]
HF = ["huggingface_hub>=0.30", "pyarrow>=15"]
REPORT = ["scipy>=1.13"]
SAFETENSORS = ["safetensors"]

setup(
    name="cifar_fast",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "cifar_fast/__init__.py").read_text(), re.MULTILINE)[1],
    description="The CIFAR-10 recipe of 94 lines and 94 seconds, with Triton kernels, CUDA graphs and parity checks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["cifar10", "pytorch", "triton", "cuda-graphs", "batch-norm", "benchmark"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # cifar_fast/kernels is a link to kernels/. The top-level name `kernels` belongs to another project.
    packages=find_packages(include=["cifar_fast", "cifar_fast.*"]),
    package_data={"cifar_fast": ["py.typed", "recipes/*.json"], "cifar_fast.kernels": ["launch.json", "cpu.cpp"]},
    entry_points={"console_scripts": ["cifar-fast = cifar_fast.cli.main:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "pillow",
        "matplotlib",
        "tqdm",
        "tomli; python_version < '3.11'",  # Python has tomllib since 3.11
    ],
    extras_require={
        "hf": HF,
        "tensorboard": TENSORBOARD,
        "report": REPORT,
        "export": [*SAFETENSORS, "onnx", "onnxscript", "onnxruntime"],
        "dev": [
            *HF,
            *TENSORBOARD,
            *REPORT,
            *SAFETENSORS,
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "nbclient",
            "nbformat",
            "ipykernel",
            "ipywidgets",
            "ruff~=0.17.6",
            "mypy~=2.4",
            "import-linter~=2.15",
            "pre-commit",
            "setuptools>=77",
        ],
    },
)
