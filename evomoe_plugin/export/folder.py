"""Write the exported folder, completely or not at all."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from evomoe_plugin.checkpoint.atomic_files import reason_of
from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.export.tokenizer import write_json, write_tokenizer
from evomoe_plugin.export.weights import exported_model
from evomoe_plugin.generation.loading import TrainedModel

logger = logging.getLogger(__name__)
_MODELING = "modeling_evomoe.py"


def export(trained: TrainedModel, out: str, without_eval_capacity: bool = False) -> Path:
    """Write model, configuration, tokenizer and code to the folder `out`.

    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` gives the logits of the
    trained model in evaluation mode.

    Raises:
        OptionError: `out` exists, or the model cannot be exported; nothing is written.
        RunFailed: the disk is full; partial output is removed.
    """
    target = Path(out)
    check_output("DIR", out, makes_folders=True)
    config, tensors = exported_model(trained, without_eval_capacity)
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent) as temporary:
            work = Path(temporary, target.name)
            work.mkdir()
            save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
            ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(
                work / "config.json",
                {
                    "model_type": "evomoe",
                    "architectures": ["EvoMoEForCausalLM"],
                    "dtype": "float32",
                    "auto_map": {
                        "AutoConfig": "modeling_evomoe.EvoMoEConfig",
                        "AutoModelForCausalLM": "modeling_evomoe.EvoMoEForCausalLM",
                    },
                    **config,
                },
            )
            write_json(work / "generation_config.json", {**ids, **_response_ends(trained)})
            shutil.copyfile(Path(__file__).with_name(_MODELING), work / _MODELING)
            write_tokenizer(trained, work)
            work.rename(target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"cannot write {out}: {reason_of(error)}; partial output is removed"
        ) from error
    return target


def _response_ends(trained: TrainedModel) -> dict[str, list[int]]:
    """The ids that end a text, where a chat template has its own beside end-of-sentence."""
    if trained.codec.chat_template() is None:
        return {}
    try:
        stops = trained.codec.encode_chat(["x"]).stops
    except OptionError as error:
        logger.warning("%s; generation will end at end-of-sentence only", error)
        return {}
    return {"eos_token_id": sorted({trained.dictionary.eos(), *stops})} if stops else {}
