"""Load a trained model from its checkpoint and data folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, data_utils
from fairseq.models import ARCH_MODEL_REGISTRY, BaseFairseqModel
from omegaconf import open_dict

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import existing_file, read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.gates import gate_names
from evomoe_plugin.generation.text import TextCodec

TRANSLATION = "translation"
OF_TEXT = {
    "masked_lm": "a masked language model",
    TRANSLATION: "a translation model",
}
"""Tasks of models that read text, beside language models, and what those are called."""


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
    dtype: torch.dtype = torch.float32
    """Of the embeddings in the checkpoint."""
    num_updates: int = 0
    """Completed by the run that wrote the checkpoint."""
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    """fairseq's: the last validation and the meters, among others."""
    target_codec: TextCodec | None = None
    """Of the side that a translation model writes."""

    @property
    def start(self) -> int:
        """Token id that sequences start with."""
        if getattr(self.cfg.task, "add_bos_token", False):
            return self.dictionary.bos()
        return self.dictionary.eos() if self.codec.start is None else self.codec.start


def load_trained_model(
    option: str,
    path: str,
    data: str | None = None,
    experts_over: int = 1,
    others: Collection[str] = (),
) -> TrainedModel:
    """Load any checkpoint that `fairseq-eval-lm` reads; no code in the file is executed.

    Args:
        option: the option that gave the file, for messages.
        path: the checkpoint; with `--use-sharded-state`, its common name or the file of any rank.
        data: folder with dict.txt and the tokenizer; None: the folder it was trained with.
        experts_over: number of ranks that the experts are sharded over, each of which calls this.
        others: of `OF_TEXT`, whose models are read as well.
    Raises:
        OptionError: no such file or folder, not such a model, or they do not match.
    """
    state = read_checkpoint(option, path, {"moe_expert_parallel_size": experts_over})
    with report_config_faults(option, path):
        task = state["cfg"].get("task") or {}
        name = task.get("_name")
        is_language_model = str(name).startswith("language_modeling")
        if not is_language_model and name not in others:
            *kinds, last = ["a language model", *(OF_TEXT[other] for other in others)]
            wanted = f"{', '.join(kinds)} or {last}" if kinds else last
            raise OptionError(
                option, path, f"was trained with the task {name}: give a checkpoint of {wanted}"
            )
        given = utils.split_paths(str(task.get("data") or ""))[0] if data is None else data
        folder = Path(given)
        files = ["dict.txt"]
        if name == TRANSLATION:
            langs = [task.get("source_lang"), task.get("target_lang")]
            if None in langs and folder.is_dir():  # found by the task, as here
                langs = data_utils.infer_language_pair(str(folder))
            files = [f"dict.{lang or 'LANG'}.txt" for lang in langs]
        for file in files:
            if not (folder / file).is_file():
                whose = " (the folder it was trained with)" if data is None else ""
                raise OptionError(
                    "data",
                    f"{folder}{whose}",
                    f"has no {file}: give --data, the folder written by evomoe prepare",
                )
            load_dictionary("data", folder / file)
        with open_dict(state["cfg"]):
            task["data"] = str(folder)
            if name == TRANSLATION:
                task["source_lang"], task["target_lang"] = langs
        # A user package that the checkpoint names is not reported: a file must not decide what a
        # user imports and runs.
        model = state["cfg"].model
        arch, gate = model.get("_name") or model.get("arch"), model.get("moe_gate")
        for kind, needed, registered in (
            ("architecture", arch, ARCH_MODEL_REGISTRY),
            ("gate", gate, (None, *gate_names())),
        ):
            if needed not in registered:
                raise OptionError(
                    option,
                    path,
                    f"has the {kind} {needed}: give --user-dir, the package that registers it",
                )
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [existing_file(option, path)], state=state
        )
    dictionary = task.source_dictionary
    if is_language_model and len(task.target_dictionary) != len(dictionary):
        raise OptionError(
            "output_dictionary_size",
            len(task.target_dictionary),
            f"its input dictionary has another size ({len(dictionary)}): the "
            "model cannot continue its own output",
        )
    if name == TRANSLATION:
        codec, target_codec = (
            TextCodec(folder, words, lang=lang)
            for words, lang in zip((dictionary, task.target_dictionary), langs, strict=True)
        )
    else:
        codec = TextCodec(folder, dictionary, getattr(cfg.task, "chat_template", None))
        target_codec = None
    history = state.get("optimizer_history") or [{}]
    return TrainedModel(
        models[0].eval(),
        cfg,
        dictionary,
        codec,
        folder,
        getattr(state["model"].get("decoder.embed_tokens.weight"), "dtype", torch.float32),
        history[-1].get("num_updates") or 0,
        state.get("extra_state") or {},
        target_codec,
    )
