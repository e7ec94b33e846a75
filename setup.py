"""The package: what it needs on each platform, and where its files come from."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "evomoe_plugin/__init__.py").read_text(), re.MULTILINE
).group(1)

# fairseq's own release (0.12.2) cannot be imported on Python 3.11 and newer. ve-fairseq is
# upstream's main with that mended, as wheels for these platforms only; fairseq-fixed is an older
# main with the same fix, as a source distribution.
HAS_WHEEL = (
    'sys_platform == "linux" and platform_machine == "x86_64" and python_version < "3.13"'
)
HAS_NO_WHEEL = (
    'sys_platform != "linux" or platform_machine != "x86_64" or python_version >= "3.13"'
)

EXTRAS = {
    "plots": ["matplotlib"],
    "tensorboard": ["tensorboard"],
    "export": ["transformers"],
    "benchmarks": ["matplotlib", "psutil"],
    "tests": ["hypothesis", "psutil", "pytest", "pytest-xdist", "transformers"],
    "lm-eval": ["accelerate", "lm-eval", "transformers"],
    "lint": ["ruff"],
}

# Packages whose folder is not the one that their name says. Both are namespace packages: Hydra
# finds its plugins in every `hydra_plugins` folder of the path, so that one may have no __init__.
MAPPED = {
    "evomoe_plugin.hydra_configs": "hydra_configs",
    "hydra_plugins.evomoe_searchpath": "evomoe_plugin/launch/hydra_plugins/evomoe_searchpath",
}
MAPPED = {name: folder for name, folder in MAPPED.items() if (ROOT / folder).is_dir()}

setup(
    name="evomoe_plugin",
    version=VERSION,
    description="Mixture-of-experts language models that grow sparse, as a plugin of fairseq",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The evomoe_plugin authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=[
        f"ve-fairseq==0.12.3 ; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1 ; {HAS_NO_WHEEL}",
        "fairscale>=0.4.13",
        "hydra-core>=1.3.2,<1.4",
        "iopath",
        "numpy",
        "omegaconf",
        "packaging",
        "pyarrow",
        "rich",
        "safetensors",
        "sentencepiece",
        "torch>=2.10",
    ],
    extras_require=EXTRAS,
    packages=find_packages(include=["evomoe_plugin", "evomoe_plugin.*"]) + list(MAPPED),
    package_dir=MAPPED,
    package_data={"evomoe_plugin.hydra_configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["evomoe = evomoe_plugin.cli:main"]},
)
