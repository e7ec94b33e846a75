"""Load a trained language model from its checkpoint and data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, BaseFairseqModel
from omegaconf import DictConfig, open_dict

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import existing_file, read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.gates import gate_names
from evomoe_plugin.generation.text import TextCodec

_DICTIONARY = "dict.txt"


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, on the CPU in fp32, with its configuration and tokenizer."""

    model: BaseFairseqModel
    cfg: Any
    """The checkpoint's configuration."""
    dictionary: Dictionary
    codec: TextCodec
    folder: Path
    """Has dict.txt and the tokenizer's files."""

    @property
    def start(self) -> int:
        """Token id that sequences start with."""
        if getattr(self.cfg.task, "add_bos_token", False):
            return self.dictionary.bos()
        return self.dictionary.eos()


def load_trained_model(option: str, path: str, data: str | None = None) -> TrainedModel:
    """Load any checkpoint that `fairseq-eval-lm` reads; no code in the file is executed.

    Args:
        option: the option that gave the file, for messages.
        path: the checkpoint; with `--use-sharded-state`, its common name or the file of any rank.
        data: folder with dict.txt and the tokenizer; None: the folder it was trained with.
    Raises:
        OptionError: no such file or folder, not a language model, or they do not match.
    """
    state = read_checkpoint(option, path)
    with report_config_faults(option, path):
        task = state["cfg"].get("task") or {}
        name = task.get("_name")
        if not str(name).startswith("language_modeling"):
            raise OptionError(option, path, f"was trained with the task {name}: give a "
                                            "checkpoint of a language model")
        folder = _data_folder(data, task.get("data"))
        load_dictionary("data", folder / _DICTIONARY)
        with open_dict(state["cfg"]):
            task.data = str(folder)
        _check_registered(option, path, state["cfg"].model)
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [existing_file(option, path)], state=state)
    dictionary = task.source_dictionary
    if len(task.target_dictionary) != len(dictionary):
        raise OptionError("output_dictionary_size", len(task.target_dictionary),
                          f"its input dictionary has another size ({len(dictionary)}): the "
                          "model cannot continue its own output")
    return TrainedModel(models[0].eval(), cfg, dictionary, TextCodec(folder, dictionary), folder)


def _check_registered(option: str, path: str, model: DictConfig) -> None:
    """Raise `OptionError` if the model needs a user package that is not imported.

    The package named in the checkpoint is not reported: a file must not decide what a user imports
    and runs.
    """
    remedy = "give --user-dir, the package that registers it"
    name = model.get("_name") or model.get("arch")
    if name not in ARCH_MODEL_REGISTRY:
        raise OptionError(option, path, f"has the architecture {name}: {remedy}")
    gate = model.get("moe_gate")
    if gate is not None and gate not in gate_names():
        raise OptionError(option, path, f"has the gate {gate}: {remedy}")


def _data_folder(given: str | None, trained_with: str | None) -> Path:
    folder = Path(given) if given is not None else None
    if folder is None:
        paths = utils.split_paths(str(trained_with or ""))
        folder = Path(paths[0]) if paths else Path()
    if not (folder / _DICTIONARY).is_file():
        whose = "" if given is not None else " (the folder it was trained with)"
        raise OptionError("data", f"{folder}{whose}", "has no dict.txt: give --data, the folder "
                                                      "written by evomoe prepare")
    return folder
