"""One line for a configuration that Hydra cannot compose."""

from __future__ import annotations

import pytest
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException

import evomoe_plugin  # noqa: F401  registers what the files name
from evomoe_plugin.launch import hydra_errors
from tests.conftest import ROOT

RUN = "small/evomoe_dts"
CASES = {
    "a key": (RUN, "model.moe_gatee=top_k", r"model\.moe_gatee: .* did you mean moe_gate\?$"),
    "a key unlike any": (RUN, "model.xyzzy=1", r"model\.xyzzy: Key 'xyzzy' [^;]*$"),
    "a value": (RUN, "optimization.lr=0.1", r"optimization\.lr: .* float is not a ListConfig"),
    "a number": (RUN, "optimization.max_update=x", r"optimization\.max_update: Value 'x' .* Int"),
    "a choice": (RUN, "optimizer=adan", r"optimizer/adan: .* did you mean adam\?; one of: .*, nag"),
    "a file": (
        RUN,
        "+gate=switsh",
        r"small/gate/switsh: .* did you mean switch\?; one of: base_layers",
    ),
    "the run": ("small/evomoedts", "", r"small/evomoedts: .* did you mean evomoe_dts\?; one of"),
    "syntax": (
        RUN,
        "model.moe_gate=[",
        r"model\.moe_gate=\[: no viable alternative at .*'\['$",
    ),
}


@pytest.fixture(autouse=True)
def explained(monkeypatch):
    load = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)  # put back at the end
    hydra_errors.explain()


@pytest.mark.filterwarnings(r"ignore:\s*version_base")
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_composed_is_one_line(case):
    run, override, message = CASES[case]
    hydra_init()
    GlobalHydra.instance().clear()
    with (
        initialize_config_dir(str(ROOT / "hydra_configs"), version_base="1.1"),
        pytest.raises(ConfigCompositionException, match=f"^error: {message}") as error,
    ):
        compose(run, [override] if override else [])
    assert "\n" not in str(error.value)
