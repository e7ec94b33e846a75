"""Options, gates, files and tests named in the documentation exist."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from evomoe_plugin.config.options import UNSUPPORTED, MoEOptions
from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterionConfig
from evomoe_plugin.gates import gate_class, gate_names
from evomoe_plugin.gates.auxiliary import LOSSES
from evomoe_plugin.tasks.language_modeling_sft import LanguageModelingSFTConfig

ROOT = Path(__file__).parents[1]
TABLE = dict(
    re.findall(r"^\| `--(moe-[\w-]+)` \| (.+?) \|", (ROOT / "docs/options.md").read_text(), re.M)
)
OURS = [name for name in gate_names() if gate_class(name).__module__.startswith("evomoe_plugin.")]
OWNERS = (
    MoEOptions,
    MoECrossEntropyCriterionConfig,
    LanguageModelingSFTConfig,
    *(gate_class(name).Options for name in OURS),
)
FIELDS = list(
    {
        field.name: field
        for owner in OWNERS
        for field in dataclasses.fields(owner)
        if field.name.startswith("moe_") and field.metadata["help"] != argparse.SUPPRESS
    }.values()
)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_is_documented_with_its_default(field):
    documented = TABLE[field.name.replace("_", "-")]
    if field.default is not None:  # a default in words
        assert documented == str(field.default)


def test_what_cannot_be_upcycled_is_listed():
    text = (ROOT / "docs/upcycling.md").read_text()
    listed = text[
        text.index("unless it\nwas trained with") : text.index("Those are refused by name")
    ]
    assert set(re.findall(r"`--([\w-]+)`", listed)) == {n.replace("_", "-") for n in UNSUPPORTED}


def test_no_option_is_made_up():
    assert {name.replace("-", "_") for name in TABLE} == {field.name for field in FIELDS}


@pytest.mark.parametrize("name", OURS)
def test_every_gate_and_its_losses_are_documented(name):
    text = (ROOT / "docs/options.md").read_text()
    assert f"| `{name}`" in text or f", `{name}` |" in text
    gate = gate_class(name)
    for loss in (*LOSSES, *gate.capabilities.losses):
        assert f"`{loss}`" in text, loss
    default = gate.capabilities.default_aux
    assert default == "none" or f"`{default}`" in text in text


PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "examples").glob("**/*.md")),
    *sorted((ROOT / "benchmarks").glob("*/README.md")),
]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_named_files_and_named_tests_exist(page):
    text = page.read_text()
    for path, name in re.findall(
        r"`((?:tests|docs|examples|benchmarks|hydra_configs)/[\w./-]+)"
        r"(?:::(\w+))?`",
        text,
    ):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_what_the_commands_of_the_documentation_write_is_ignored():
    written = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.sh")):
        for found in re.finditer(
            r"(?:--out |--save-dir |tee |--local-dir |evomoe (?:upcycle|export|import-hf) \S+ )"
            r"\"?(?:\$\{\w+:-)?([a-z][\w.-]*)",
            page.read_text(),
        ):
            written.add(found[1])
    assert {"data-bin", "checkpoints", "moe.pt", "exported", "imported", "train.log"} <= written
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert [name for name in written if not {f"/{name}", f"/{name}/"} & {*ignored}] == []
