"""Dense language models as fairseq saves them, without training one."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from fairseq import models, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from evomoe_plugin.checkpoint.load import load_file as load

VOCABULARY = 40
SIZES = {"layers": 4, "width": 16, "ffn": 24, "heads": 2}


def dictionary_of(size: int = VOCABULARY) -> Dictionary:
    dictionary = Dictionary()
    for n in range(size - len(dictionary)):
        dictionary.add_symbol(f"w{n}", n=1000 // (n + 1))
    return dictionary


def task_of(dictionary: Dictionary):
    return types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def dense_config(*given: str, data: str = "data-bin"):
    """fairseq's configuration of a run."""
    parser = options.get_training_parser()
    sizes = SIZES
    args = options.parse_args_and_arch(
        parser,
        [
            data,
            "--task",
            "language_modeling",
            "--arch",
            "transformer_lm",
            "--decoder-layers",
            str(sizes["layers"]),
            "--decoder-embed-dim",
            str(sizes["width"]),
            "--decoder-ffn-embed-dim",
            str(sizes["ffn"]),
            "--decoder-attention-heads",
            str(sizes["heads"]),
            "--decoder-input-dim",
            str(sizes["width"]),
            "--decoder-output-dim",
            str(sizes["width"]),
            "--activation-fn",
            "gelu",
            "--tokens-per-sample",
            "32",
            "--optimizer",
            "adam",
            "--lr",
            "0.01",
            "--max-tokens",
            "64",
            "--dropout",
            "0",
            *given,
        ],
    )
    return convert_namespace_to_omegaconf(args)


def build(state: dict, dictionary: Dictionary):
    """The model of a checkpoint, with its weights, in evaluation."""
    cfg = OmegaConf.create(state["cfg"])
    model = models.build_model(cfg.model, task_of(dictionary), from_checkpoint=True)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    return model.eval()


def save_dense(
    path: Path,
    *given: str,
    dictionary: Dictionary | None = None,
    seed: int = 3,
    data: str = "data-bin",
) -> Path:
    """A dense checkpoint with weights that make experts and logits differ."""
    return save_model(path, dense_config(*given, data=data), dictionary, seed)


def save_model(path: Path, cfg, dictionary: Dictionary | None = None, seed: int = 3) -> Path:
    """The checkpoint of a run with this configuration."""
    dictionary = dictionary or dictionary_of()
    torch.manual_seed(seed)
    model = models.build_model(cfg.model, task_of(dictionary))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    torch.save(
        {
            "args": None,
            "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
            "model": model.state_dict(),
            "criterion": None,
            "optimizer_history": [
                {
                    "criterion_name": "CrossEntropyCriterion",
                    "optimizer_name": "FairseqAdam",
                    "lr_scheduler_state": {},
                    "num_updates": 7,
                }
            ],
            "task_state": {},
            "extra_state": {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0}},
            "last_optimizer_state": None,
        },
        path,
    )
    return path


def dense_model(path: Path, dictionary: Dictionary | None = None):
    with open(path, "rb") as file:
        return build(load(file), dictionary or dictionary_of())


def tokens(batch: int = 3, length: int = 11, size: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(4, size, (batch, length), generator=generator)
    drawn[-1, -4:] = 1  # padding
    return drawn


def largest_difference(one, other, size: int = VOCABULARY) -> float:
    """Of the logits of two models, padding left out."""
    drawn = tokens(size=size)
    with torch.no_grad():
        difference = (one(drawn)[0] - other(drawn)[0])[drawn != 1]
    return difference.abs().max().item()
