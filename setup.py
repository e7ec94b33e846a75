"""What pyproject.toml cannot say: one fairseq for each platform, and packages mapped to folders."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# fairseq's own release (0.12.2) cannot be imported on Python 3.11 and newer. ve-fairseq is
# upstream's main with that fixed, as wheels for these platforms only; fairseq-fixed is an older
# main with the same fix, as a source distribution.
HAS_WHEEL = 'sys_platform == "linux" and platform_machine == "x86_64" and python_version < "3.13"'
HAS_NO_WHEEL = 'sys_platform != "linux" or platform_machine != "x86_64" or python_version >= "3.13"'

# Packages whose folder is not the one that their name says. Hydra finds its plugins in every
# `hydra_plugins` folder of the path, so that one may have no __init__.
MAPPED = {
    "evomoe_quiet_imports": "evomoe_plugin/quiet_imports",
    "evomoe_plugin.hydra_configs": "hydra_configs",
    "hydra_plugins.evomoe_searchpath": "evomoe_plugin/launch/hydra_plugins/evomoe_searchpath",
}
MAPPED = {name: folder for name, folder in MAPPED.items() if (ROOT / folder).is_dir()}

setup(
    install_requires=[
        f"ve-fairseq==0.12.3 ; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1 ; {HAS_NO_WHEEL}",
        "fairscale>=0.4.13",
        "hydra-core>=1.3.2,<1.4",
        "iopath",
        # Older releases let templates out of the sandbox.
        "jinja2>=3.1.6",
        "numpy",
        "omegaconf",
        "packaging",
        "pyarrow",
        "rich",
        "safetensors",
        "sentencepiece",
        "tokenizers>=0.20",
        # The oldest release that the tests run with.
        "torch>=2.13",
    ],
    packages=find_packages(include=["evomoe_plugin", "evomoe_plugin.*"]) + list(MAPPED),
    package_dir=MAPPED,
)
