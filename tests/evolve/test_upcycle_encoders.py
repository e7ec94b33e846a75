"""Experts from dense RoBERTas and Transformers of stock fairseq."""

import math
import re

import pytest
import torch
from fairseq import models, options
from fairseq.data import Dictionary
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from evomoe_plugin.cli import main
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.start import init_from_dense
from evomoe_plugin.evolve.upcycle import Recipe
from tests.evolve.conftest import trainer_of
from tests.evolve.dense_models import dictionary_of, save_model, task_of
from tests.tiny_runs import Runs

SIDE = """--{0}-layers 2 --{0}-embed-dim 16 --{0}-ffn-embed-dim 24
--{0}-attention-heads 2"""
DENSE = {
    "roberta": f"--task masked_lm --arch roberta {SIDE.format('encoder')} --max-positions 32",
    "translation": f"--task translation --arch transformer {SIDE.format('encoder')} "
    f"{SIDE.format('decoder')} --share-all-embeddings --activation-fn gelu",
}
CRITERIONS = {"roberta": "moe_masked_lm", "translation": "moe_cross_entropy"}
GATE = {"moe_gate": "top_p", "moe_expert_count": "3"}
FAMILIES = pytest.mark.parametrize("family", DENSE)


def save(path, family):
    """A checkpoint of a dense model, as fairseq saves it."""
    words = ["data-bin", *DENSE[family].split(), *"--optimizer adam --max-tokens 64".split()]
    if family == "roberta":
        words += ["--criterion", "masked_lm", "--tokens-per-sample", "32"]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    cfg = convert_namespace_to_omegaconf(args)
    save_model(path, cfg)
    dense = models.build_model(cfg.model, task_of(dictionary_of()))
    dense.load_state_dict(torch.load(path, weights_only=False)["model"])
    return str(path), dense


def outputs(model, family):
    tokens = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    given = (tokens, None, tokens) if family == "translation" else (tokens,)
    with torch.no_grad():
        return model.eval()(*given)[0]


@FAMILIES
def test_copies_compute_what_the_dense_model_does(tmp_path, family):
    path, dense = save(tmp_path / "dense.pt", family)
    converted = convert(path, GATE, Recipe(gate_init="normal:0.1"))
    assert converted.logits.equal, converted.logits
    assert converted.upcycling.slots == [3] * (2 if family == "translation" else 1)
    cfg = OmegaConf.create(converted.state["cfg"])
    assert cfg.criterion._name == CRITERIONS[family]
    model = models.build_model(cfg.model, task_of(dictionary_of()), from_checkpoint=True)
    model.load_state_dict(converted.state["model"], model_cfg=cfg.model)
    assert torch.allclose(outputs(model, family), outputs(dense, family), atol=1e-5)


@FAMILIES
def test_a_run_starts_with_what_the_verb_would_write(tmp_path, family, caplog):
    path, _ = save(tmp_path / "dense.pt", family)
    recipe = Recipe("mask", rate=0.4, gate_init="normal:0.1", seed=1, in_run=True)
    state = convert(path, GATE, recipe).state
    given = {"moe_init_method": "mask", "moe_init_rate": 0.4, "moe_init_gate": "normal:0.1"}
    cfg = OmegaConf.create({**state["cfg"]["model"], **given, "moe_init_from_dense": path})
    torch.manual_seed(9)
    model = models.build_model(cfg, task_of(dictionary_of()))
    caplog.set_level("INFO")
    init_from_dense(trainer_of(model, num_updates=0))
    assert "logits differ from the dense model's" in caplog.text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state["model"][name]), name


@FAMILIES
def test_what_does_not_fit_is_refused(tmp_path, family):
    path, _ = save(tmp_path / "dense.pt", family)
    with pytest.raises(OptionError, match="is of another kind: give (roberta_base|transformer)_m"):
        convert(path, GATE, Recipe(), arch="transformer_lm_moe")
    with pytest.raises(OptionError, match="--encoder-layers 3: the dense checkpoint .* has 2"):
        convert(path, {**GATE, "encoder_layers": 3}, Recipe())
    dictionary = Dictionary()
    cfg = {**convert(path, GATE, Recipe()).state["cfg"]["model"], "moe_init_from_dense": path}
    model = models.build_model(OmegaConf.create(cfg), task_of(dictionary))
    with pytest.raises(OptionError, match="has 4 tokens, the dense checkpoint was trained with 40"):
        init_from_dense(trainer_of(model, num_updates=0))


@FAMILIES
def test_the_verb_evaluates_both_models(tmp_path, family, capsys):
    (tmp_path / "text").mkdir()
    words = [" ".join(f"w{(7 * n + i) % 36}" for i in range(3, 9)) for n in range(20)]
    for lang in ("de", "en"):
        (tmp_path / f"text/valid.{lang}").write_text("\n".join(words) + "\n")
    # fairseq's task adds <mask>.
    dictionary_of(40 - (family == "roberta")).save(str(tmp_path / "dict.txt"))
    given = ["--srcdict", tmp_path / "dict.txt", "--workers", "1"]
    if family == "translation":
        given += ["--source-lang", "de", "--target-lang", "en", "--joined-dictionary"]
        given += ["--validpref", tmp_path / "text/valid"]
    else:
        given += ["--only-source", "--validpref", tmp_path / "text/valid.de"]
    assert Runs(tmp_path, tmp_path).run("preprocess", *given, "--destdir", tmp_path / "data") == 0
    path, dense = save(tmp_path / "dense.pt", family)
    words = ["upcycle", path, tmp_path / "moe.pt", "--moe-gate", "top_p", "--data"]
    capsys.readouterr()
    assert main([*map(str, words), str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"dense ([\d.]+), MoE ([\d.]+) ", printed).groups())
    assert before == pytest.approx(after, rel=1e-4)  # copies
    if family == "translation":  # the oracle: every pair by itself
        loss = count = 0
        for row in load_indexed_dataset(str(tmp_path / "data/valid.de-en.de"), None):
            row = row.long()
            moved = torch.cat([row[-1:], row[:-1]])
            logits = dense.eval()(row[None], None, moved[None])[0][0]
            loss += torch.nn.functional.cross_entropy(logits, row, reduction="sum").item()
            count += len(row)
        assert before == pytest.approx(math.exp(loss / count), rel=1e-3)


def test_the_verb_places_experts_on_each_side(tmp_path, capsys):
    path, _ = save(tmp_path / "dense.pt", "translation")
    words = ["upcycle", path, tmp_path / "moe.pt", "--moe-gate", "top_p", "--moe-expert-count", "4"]
    words += ["--method", "slice", "--moe-expert-size-factor", "2", "--rescale"]
    assert main([*map(str, words), "--encoder-moe-layers", "none", "--decoder-moe-freq", "1"]) == 0
    printed = capsys.readouterr().out
    assert "moe.pt: 2 of 4 layers with 4 experts of width 12 each, by slice" in printed
