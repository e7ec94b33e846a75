"""Write the exported folder, completely or not at all."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from evomoe_plugin.checkpoint.atomic_files import reason_of, sync
from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.export.misfit import Misfit
from evomoe_plugin.export.model_card import model_card
from evomoe_plugin.export.native import NATIVE, Native, closest, native_model
from evomoe_plugin.export.shards import MAX_SHARD, Planned, parse_size, write_shards
from evomoe_plugin.export.tokenizer import write_json, write_tokenizer
from evomoe_plugin.export.weights import check_exportable, exported_model
from evomoe_plugin.generation.loading import TrainedModel

logger = logging.getLogger(__name__)
AUTO, EVOMOE = "auto", "evomoe"
FORMATS = (AUTO, *NATIVE, EVOMOE)
_REMOTE = Path(__file__).with_name("remote")
_MODELING = tuple(
    f"{part}_evomoe.py"
    for part in ("modeling", "configuration", "attention", "experts", "gate", "positions")
)


@dataclass(frozen=True)
class Exported:
    """A written folder."""

    path: Path
    format: str
    """A `model_type` of transformers, or evomoe."""
    why: str | None = None
    """Of `auto`, why no class of transformers could be taken."""
    tokenizer_code: str | None = None
    """Why `AutoTokenizer` needs `trust_remote_code=True`; None: it does not."""


def export(
    trained: TrainedModel,
    out: str,
    without_eval_capacity: bool = False,
    format: str = AUTO,
    max_shard_size: str = MAX_SHARD,
) -> Exported:
    """Write model, configuration, tokenizer and model card to the folder `out`.

    `AutoModelForCausalLM.from_pretrained(out)` gives the logits of the trained model in evaluation
    mode; with the format evomoe, the folder has the model's code, and it needs
    `trust_remote_code=True`, as `AutoTokenizer` does for a SentencePiece model that has no
    equal tokenizer.json. Weights have the dtype of the checkpoint.

    Args:
        without_eval_capacity: leave out capacities in evaluation.
        format: of `FORMATS`; `auto` takes the first of `NATIVE` that computes the same, else
            evomoe.
        max_shard_size: of a file of weights, such as "5GB".
    Raises:
        OptionError: `out` exists, or the model cannot be exported, or not in this format; nothing
            is written.
        RunFailed: the disk is full; partial output is removed.
    """
    target = Path(out)
    check_output("DIR", out, makes_folders=True)
    max_bytes = parse_size("max_shard_size", max_shard_size)
    check_exportable(trained, without_eval_capacity)
    chosen, config, tensors, why = _chosen(trained, format)
    planned = [Planned.of(name, tensor, trained.dtype) for name, tensor in tensors]
    dictionary = trained.dictionary
    ids = {
        "bos_token_id": trained.start,
        "eos_token_id": dictionary.eos(),
        "pad_token_id": dictionary.pad(),
    }
    config = {**config, **ids, "dtype": str(trained.dtype).removeprefix("torch.")}
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent) as temporary:
            work = Path(temporary, target.name)
            work.mkdir()
            write_shards(work, planned, max_bytes)
            write_json(work / "config.json", config)
            write_json(work / "generation_config.json", _generation(trained, ids))
            if chosen == EVOMOE:
                for name in _MODELING:
                    shutil.copyfile(_REMOTE / name, work / name)
            tokenizer_code = write_tokenizer(trained, work)
            card = model_card(trained, chosen, target.name, planned, bool(tokenizer_code))
            (work / "README.md").write_text(card, encoding="utf-8")
            for path in (*work.iterdir(), work):
                sync(path)
            work.rename(target)
            sync(parent)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"cannot write {out}: {reason_of(error)}; partial output is removed"
        ) from error
    return Exported(target, chosen, why, tokenizer_code)


def check_format(format: str) -> None:
    """Raise `OptionError` unless there is such a format."""
    if format not in FORMATS:
        raise OptionError("format", format, f"one of: {', '.join(FORMATS)}")


def _chosen(
    trained: TrainedModel, format: str
) -> tuple[str, dict[str, Any], Iterable[tuple[str, Tensor]], str | None]:
    """Format, config.json, tensors by name, and why it is not native with `auto`."""
    check_format(format)
    native: Native | None = None
    why = None
    if format == AUTO:
        try:
            found = closest(trained)
            if isinstance(found, Native):
                native = found
            else:
                why = f"{found[0]} has no {found[1]}"
        except ImportError as error:
            why = (
                f"its own classes need transformers: pip install 'evomoe_plugin[export]' ({error})"
            )
    elif format != EVOMOE:
        try:
            native = native_model(trained, format)
        except ImportError as error:
            raise OptionError(
                "format",
                format,
                f"is made by transformers: pip install 'evomoe_plugin[export]' ({error})",
            ) from error
        except Misfit as misfit:
            raise OptionError(
                "format",
                format,
                f"it has no {misfit}: give --format auto, or evomoe (with code of this package)",
            ) from None
    if native is not None:
        return native.kind, native.config, native.tensors, None
    config, tensors = exported_model(trained)
    named = {
        "model_type": "evomoe",
        "architectures": ["EvoMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_evomoe.EvoMoEConfig",
            "AutoModelForCausalLM": "modeling_evomoe.EvoMoEForCausalLM",
        },
    }
    return EVOMOE, {**named, **config}, tensors.items(), why


def _generation(trained: TrainedModel, ids: dict[str, int]) -> dict[str, Any]:
    """The generation_config.json: what ends a text, and the ids that are never generated, as in
    `evomoe generate`."""
    ends = {ids["eos_token_id"]}
    if trained.codec.chat_template() is not None:
        try:
            ends.update(trained.codec.encode_chat(["x"]).stops)
        except OptionError as error:
            logger.warning("%s; generation will end at end-of-sentence only", error)
    config: dict[str, Any] = {**ids}
    if len(ends) > 1:
        config["eos_token_id"] = sorted(ends)
    if never := sorted(set(trained.codec.without_text()) - ends):
        config["suppress_tokens"] = never
    return config
