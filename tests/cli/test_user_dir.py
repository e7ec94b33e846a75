"""`--user-dir`: the verbs that build models know a user's own gate and architectures."""

import argparse
import copy

import pytest
import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY
from hydra.core.config_store import ConfigStore

from evomoe_plugin.cli import TAKE_USER_DIR, VERBS, main
from evomoe_plugin.cli.user_dir import import_user_dir
from evomoe_plugin.gates import registry
from tests.evolve.dense_models import dictionary_of, save_dense

PACKAGE = '''
from dataclasses import dataclass, field

import torch
from fairseq.models import register_model, register_model_architecture

from evomoe_plugin.gates import Choice, Gate, ScorerOptions, register_gate
from evomoe_plugin.models.config import MoELanguageModelConfig
from evomoe_plugin.models.language_model import MoELanguageModel


@dataclass
class UserOptions(ScorerOptions):
    moe_user_experts: int = field(default=1, metadata={"help": "the first experts"})


@register_gate("user_first")
class UserFirst(Gate):
    Options = UserOptions

    def __init__(self, info, options):
        super().__init__(info, options)
        self.experts = options.moe_user_experts

    def route(self, x_TD, context):
        logits_TC = self.score(x_TD)
        mask_TC = torch.zeros_like(logits_TC, dtype=torch.bool)
        mask_TC[:, :self.experts] = True
        return Choice(mask_TC=mask_TC, weights_TC=mask_TC / self.experts, logits_TC=logits_TC,
                      probs_TC=logits_TC.softmax(1))


@dataclass
class UserMoEConfig(MoELanguageModelConfig):
    decoder_layers: int = 4
    decoder_embed_dim: int = 16
    decoder_ffn_embed_dim: int = 24
    decoder_attention_heads: int = 2
    moe_expert_count: str = "3"


@register_model("user_moe", dataclass=UserMoEConfig)
class UserMoE(MoELanguageModel):
    """A user's sizes."""


@register_model_architecture("transformer_lm_moe", "user_moe_wide")
def user_moe_wide(args):
    args.moe_expert_count = getattr(args, "moe_expert_count", "6")


@register_model_architecture("transformer_lm_moe", "user_moe_deep")
def user_moe_deep(args):
    args.decoder_layers = getattr(args, "decoder_layers", 48)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's package, a dictionary, and a dense checkpoint."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_moe_package").mkdir()
    (folder / "user_moe_package/__init__.py").write_text(PACKAGE)
    dictionary_of().save(str(folder / "dict.txt"))
    save_dense(folder / "dense.pt", "--decoder-normalize-before", data=str(folder))
    store = ConfigStore.instance()
    repo = copy.deepcopy(store.repo)
    yield folder
    store.repo = repo
    forget()


def forget() -> None:
    """Undo what the package registers: other tests' ranks do not import it."""
    registry._GATES.pop("user_first", None)
    for options in set(MODEL_DATACLASS_REGISTRY.values()):
        for owner in options.__mro__:
            vars(owner).get("__dataclass_fields__", {}).pop("moe_user_experts", None)
            vars(owner).get("__annotations__", {}).pop("moe_user_experts", None)


def run(folder, verb, *given) -> int:
    return main([verb, *map(str, given), "--user-dir", str(folder / "user_moe_package")])


def upcycle(folder, *given) -> dict:
    out = folder / "moe.pt"
    assert run(folder, "upcycle", folder / "dense.pt", out, "--overwrite", *given) == 0
    return torch.load(out, weights_only=True)


def test_a_users_gate_from_upcycling_to_generation(folder, capsys):
    state = upcycle(
        folder, "--moe-gate", "user_first", "--moe-user-experts", "2", "--moe-expert-count", "4"
    )
    assert "logits equal to the dense model's (max difference" in capsys.readouterr().out
    assert state["cfg"]["model"]["moe_user_experts"] == 2
    assert state["cfg"]["common"]["user_dir"] == str(folder / "user_moe_package")
    out = []
    for path in ("dense.pt", "moe.pt"):
        assert (
            run(
                folder,
                "generate",
                "--path",
                folder / path,
                "--prompt",
                "w1 w2",
                "--max-new-tokens",
                "4",
                "--cpu",
            )
            == 0
        )
        printed = capsys.readouterr()
        out.append(printed.out)
    assert out[0] == out[1]
    assert "2.00 of 4 experts per token were used" in printed.err


def test_a_users_gate_is_not_exported(folder, capsys):
    upcycle(folder, "--moe-gate", "user_first")
    capsys.readouterr()
    assert run(folder, "export", folder / "moe.pt", folder / "out") == 2
    assert "--moe-gate user_first: only gates of this package can be exported" in (
        capsys.readouterr().err
    )
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("arch", "experts"), [("user_moe", 3), ("user_moe_wide", 6)])
def test_a_users_architecture(folder, arch, experts, tmp_path, capsys):
    state = upcycle(folder, "--arch", arch, "--moe-gate", "gshard")
    assert state["cfg"]["model"]["_name"] == arch
    assert state["model"]["decoder.layers.1.moe.experts.fc1_weight"].size(0) == experts
    state = upcycle(folder, "--arch", arch, "--moe-gate", "gshard", "--moe-expert-count", "2")
    assert state["model"]["decoder.layers.1.moe.experts.fc1_weight"].size(0) == 2
    assert run(folder, "export", folder / "moe.pt", tmp_path / "out") == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def refused(capsys, status) -> str:
    assert status == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_users_architecture_of_other_sizes(folder, tmp_path, capsys):
    err = refused(
        capsys,
        run(folder, "upcycle", folder / "dense.pt", tmp_path / "moe.pt", "--arch", "user_moe_deep"),
    )
    assert "--arch user_moe_deep: has decoder_layers 48, the dense checkpoint" in err
    err = refused(
        capsys,
        run(
            folder, "upcycle", folder / "dense.pt", tmp_path / "moe.pt", "--arch", "transformer_lm"
        ),
    )
    assert (
        "one of: causal_lm_moe, " in err
        and "transformer_lm_gptmedium_moe" in err
        and "user_moe, user_moe_deep" in err
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "moe_gate",
            "of_mine",
            "has the gate of_mine: give --user-dir, the package that registers it",
        ),
        ("_name", "of_mine", "has the architecture of_mine: give --user-dir, the package"),
    ],
)
def test_what_is_not_imported_is_named(folder, tmp_path, capsys, option, value, message):
    state = upcycle(folder, "--moe-gate", "gshard")
    state["cfg"]["model"][option] = value
    state["cfg"]["common"]["user_dir"] = "my/own"
    torch.save(state, tmp_path / "moe.pt")
    capsys.readouterr()
    for arguments in (
        ["generate", "--path", tmp_path / "moe.pt", "--prompt", "w1"],
        ["export", tmp_path / "moe.pt", tmp_path / "out"],
    ):
        line = refused(capsys, main(list(map(str, arguments))))
        assert message in line
        assert "my/own" not in line  # a file must not name code to run


@pytest.mark.parametrize("verb", TAKE_USER_DIR)
def test_a_package_that_is_not_there(tmp_path, capsys, verb):
    err = refused(capsys, main([verb, "--user-dir", str(tmp_path / "gone")]))
    assert f"--user-dir {tmp_path}/gone: there is no such folder" in err


def test_other_verbs_build_no_model():
    assert set(TAKE_USER_DIR) < set(VERBS)
    parser = argparse.ArgumentParser()
    import_user_dir(parser, [])
    assert parser.parse_args([]).user_dir is None
