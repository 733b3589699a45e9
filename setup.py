from pathlib import Path

from setuptools import setup

setup(
    name="cifar_fast",
    version="0.1.0",
    description="The reference CIFAR-10 recipe, trained fast and trustworthily",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["cifar_fast", "kernels"],
    package_data={"kernels": ["launch.json"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "pillow",
        "matplotlib",
        "tqdm",
    ],
    extras_require={"dev": ["pytest", "pytest-benchmark", "hypothesis", "ruff"]},
)
