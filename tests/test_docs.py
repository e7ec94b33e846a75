"""What the documentation says of options and tests is what there is."""

import dataclasses
import re
from pathlib import Path

import pytest

from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from evomoe_plugin.gates.dense_to_sparse_options import DenseToSparseOptions
from evomoe_plugin.options import MoEOptions

ROOT = Path(__file__).parents[1]
TABLE = dict(re.findall(r"^\| `--(moe-[\w-]+)` \| (.+?) \|",
                        (ROOT / "docs/options.md").read_text(), re.M))
FIELDS = [
    field for owner in (MoEOptions, DenseToSparseOptions, MoECrossEntropyCriterionConfig)
    for field in dataclasses.fields(owner) if field.name.startswith("moe_")
]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_is_documented_with_its_default(field):
    documented = TABLE[field.name.replace("_", "-")]
    if field.default is not None:  # a default in words
        assert documented == str(field.default)


def test_no_option_is_made_up():
    assert {name.replace("-", "_") for name in TABLE} == {field.name for field in FIELDS}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"],
                         ids=lambda page: page.name)
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text()
    for path, name in re.findall(r"`((?:tests|docs|examples|benchmarks|hydra_configs)/[\w./-]+)"
                                 r"(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
