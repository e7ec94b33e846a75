"""What pyproject.toml cannot say: packages mapped to folders of other names."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Packages whose folder is not the one that their name says. Hydra finds its plugins in every
# `hydra_plugins` folder of the path, so that one may have no __init__.
MAPPED = {
    "evomoe_quiet_imports": "evomoe_plugin/quiet_imports",
    "evomoe_plugin.hydra_configs": "hydra_configs",
    "hydra_plugins.evomoe_searchpath": "evomoe_plugin/launch/hydra_plugins/evomoe_searchpath",
}
MAPPED = {name: folder for name, folder in MAPPED.items() if (ROOT / folder).is_dir()}

setup(
    packages=find_packages(include=["evomoe_plugin", "evomoe_plugin.*"]) + list(MAPPED),
    package_dir=MAPPED,
)
