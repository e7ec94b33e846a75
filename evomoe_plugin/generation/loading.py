"""A trained language model from its checkpoint and the folder of its data."""

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
    """A model in evaluation, on the CPU in fp32, and what belongs to it."""

    model: BaseFairseqModel
    cfg: Any
    """The checkpoint's configuration."""
    dictionary: Dictionary
    codec: TextCodec
    folder: Path
    """Of the data: dict.txt and the tokenizer's files."""

    @property
    def start(self) -> int:
        """The symbol that a sequence begins with."""
        if getattr(self.cfg.task, "add_bos_token", False):
            return self.dictionary.bos()
        return self.dictionary.eos()


def load_trained_model(option: str, path: str, data: str | None = None) -> TrainedModel:
    """Load what `fairseq-eval-lm` could; nothing in the file is run.

    Args:
        option: what the user named the file with, for messages.
        path: the checkpoint; of `--use-sharded-state`, its common name or the file of any rank.
        data: folder with dict.txt and the tokenizer; None: the one that it was trained with.
    Raises:
        OptionError: no such file or folder, not a language model's, or they do not fit.
    """
    state = read_checkpoint(option, path)
    with report_config_faults(option, path):
        task = state["cfg"].get("task") or {}
        name = task.get("_name")
        if not str(name).startswith("language_modeling"):
            raise OptionError(option, path, f"is of the task {name}: give a checkpoint of a "
                                            "language model")
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
                          f"the model gives other symbols than it takes ({len(dictionary)}): it "
                          "cannot go on from its own output")
    return TrainedModel(models[0].eval(), cfg, dictionary, TextCodec(folder, dictionary), folder)


def _check_registered(option: str, path: str, model: DictConfig) -> None:
    """Raise `OptionError` if the model is of a user's own package that is not imported.

    Which package the checkpoint names is not told: what a user is to import and run shall not come
    from a file.
    """
    remedy = "give --user-dir, the package of your own that registers it"
    name = model.get("_name") or model.get("arch")
    if name not in ARCH_MODEL_REGISTRY:
        raise OptionError(option, path, f"is of the architecture {name}: {remedy}")
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
        raise OptionError("data", f"{folder}{whose}", "there is no dict.txt: give --data, the "
                                                      "folder that evomoe prepare wrote")
    return folder
