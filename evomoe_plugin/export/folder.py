"""Write the exported folder, completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.export.tokenizer import write_tokenizer
from evomoe_plugin.export.weights import exported_model
from evomoe_plugin.generation.loading import TrainedModel

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
    work = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        work.chmod(0o777 & ~_umask())
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write(work / "config.json", {
            "model_type": "evomoe", "architectures": ["EvoMoEForCausalLM"], "dtype": "float32",
            "auto_map": {"AutoConfig": "modeling_evomoe.EvoMoEConfig",
                         "AutoModelForCausalLM": "modeling_evomoe.EvoMoEForCausalLM"},
            **config})
        _write(work / "generation_config.json", ids)
        shutil.copyfile(Path(__file__).with_name(_MODELING), work / _MODELING)
        write_tokenizer(trained, work)
        os.rename(work, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunFailed(f"cannot write {out}: {reason}; partial output is removed") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
