"""The MoE options every gate shares, and what makes them valid.

The dataclasses here and beside each gate are what fairseq turns into command line flags and Hydra
fields. They know nothing of fairseq.
"""

import logging
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class OptionError(ValueError):
    """An option has a value that cannot work: one line with option, value and remedy."""

    def __init__(self, option: str, value: Any, remedy: str):
        flag = "--" + option.replace("_", "-") if re.fullmatch(r"[a-z0-9_]+", option) else option
        super().__init__(f"{flag} {value}: {remedy}")
        self.arguments = (option, value, remedy)

    def __reduce__(self):  # crosses process boundaries when a spawned rank raises it
        return type(self), self.arguments


@dataclass
class MoEOptions:
    """Where MoE layers stand and what they are made of, whatever the gate."""

    moe_freq: int = field(
        default=2,
        metadata={"help": "every N-th decoder layer is an MoE layer (layer i, from 0, when N "
                          "divides i + 1); 1 makes every layer one"},
    )
    moe_expert_count: str = field(
        default="16",
        metadata={"help": "routed experts of each MoE layer: one number, one per MoE layer "
                          "(4,4,8,16), or FIRST:LAST to grow evenly with depth"},
    )
    moe_expert_ffn_dim: int = field(
        default=0,
        metadata={"help": "hidden width of an expert; 0 takes --decoder-ffn-embed-dim"},
    )
    moe_gate: str = field(
        default="dense_to_sparse",
        metadata={"help": "the gate that routes tokens to experts, by its registered name"},
    )
    # A string, because fairseq makes a boolean whose default is True a flag that turns it off.
    moe_gating_use_fp32: str = field(
        default="true",
        metadata={"help": "compute the gate in fp32 whatever the model's precision (true|false)",
                  "argparse_const": "true"},
    )


def parse_bool(option: str, value: Any) -> bool:
    """`value` (bool, or true/false in any case) as a bool, or an `OptionError`."""
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise OptionError(option, value, "give true or false")
    return text == "true"


def moe_layer_indices(options: Any, num_layers: int) -> list[int]:
    """Indices, from 0, of the decoder layers that are MoE layers.

    Raises:
        OptionError: no layer would be one.
    """
    if options.moe_freq < 1:
        raise OptionError("moe_freq", options.moe_freq,
                          "give 1 or more; for a model without MoE layers use a stock "
                          "transformer_lm architecture")
    indices = list(range(options.moe_freq - 1, num_layers, options.moe_freq))
    if not indices:
        raise OptionError("moe_freq", options.moe_freq,
                          f"gives no MoE layer in {num_layers} decoder layers; "
                          f"give at most {num_layers}")
    return indices


def expert_counts(options: Any, num_moe_layers: int) -> list[int]:
    """Routed experts of each MoE layer, `num_moe_layers` numbers.

    Raises:
        OptionError: not a number, list or range of counts, or none that fits the layers.
    """
    text = str(options.moe_expert_count).replace(" ", "")
    wanted = "give one number of at least 1, one per MoE layer (4,4,8,16), or FIRST:LAST"
    try:
        numbers = [int(part) for part in re.split("[,:]", text)]
    except ValueError:
        raise OptionError("moe_expert_count", text, wanted) from None
    if min(numbers) < 1:
        raise OptionError("moe_expert_count", text, wanted)
    if ":" in text:
        if len(numbers) != 2 or "," in text:
            raise OptionError("moe_expert_count", text, wanted)
        first, last = numbers
        steps = max(num_moe_layers - 1, 1)
        return [round(first + (last - first) * i / steps) for i in range(num_moe_layers)]
    if len(numbers) == 1:
        return numbers * num_moe_layers
    if len(numbers) != num_moe_layers:
        raise OptionError("moe_expert_count", text,
                          f"{len(numbers)} counts for {num_moe_layers} MoE layers; "
                          f"give one number or {num_moe_layers}")
    return numbers


# Parts of fairseq's transformer_lm that change what a feed-forward network or the vocabulary is,
# and NormFormer's scales, which fairseq itself takes and then ignores in its decoder.
_UNSUPPORTED = (
    "character_embeddings", "adaptive_input", "adaptive_softmax_cutoff", "quant_noise_pq",
    "quant_noise_scalar", "base_layers", "decoder_layers_to_keep", "decoder_xformers_att_config",
    "scale_fc", "scale_attn", "scale_heads", "scale_resids",
)


def validate(options: Any) -> None:
    """Check every option of an MoE model; log a warning for what is doubtful.

    Args:
        options: the fields of `MoEOptions`, of the chosen gate's options and of fairseq's
            transformer_lm.
    Raises:
        OptionError: naming the option, its value and what would be right.
    """
    from evomoe_plugin.gates import gate_class

    for option in _UNSUPPORTED:
        if getattr(options, option, None):
            raise OptionError(option, getattr(options, option),
                              "not supported by the MoE architectures: leave it out")
    width = options.decoder_embed_dim
    input_dim, output_dim = options.decoder_input_dim or width, options.decoder_output_dim or width
    if options.share_decoder_input_output_embed and input_dim != output_dim:
        raise OptionError("decoder_output_dim", output_dim,
                          f"with --share-decoder-input-output-embed it must be {input_dim}, the "
                          "decoder's input dimension")
    counts = expert_counts(options, len(moe_layer_indices(options, options.decoder_layers)))
    if options.moe_expert_ffn_dim < 0:
        raise OptionError("moe_expert_ffn_dim", options.moe_expert_ffn_dim,
                          "give a width of at least 1, or 0 for --decoder-ffn-embed-dim")
    parse_bool("moe_gating_use_fp32", options.moe_gating_use_fp32)
    for warning in gate_class(options.moe_gate).validate(options, counts) or ():
        logger.warning(warning)


def validate_run(cfg: Any) -> None:
    """Check a whole fairseq run before any process is started.

    Args:
        cfg: fairseq's configuration; `cfg.model` is None for runs that take it from a checkpoint.
    Raises:
        OptionError: as `validate`, and for data that is not there.
    """
    _check_data(cfg)
    model = cfg.model
    # A hand-written yaml may leave fields to the architecture's defaults; then the check waits
    # for `build_model`, which knows them.
    if model is None or any(f.name not in model for f in fields(MoEOptions)):
        return
    validate(model)
    if cfg.criterion is not None and cfg.criterion._name == "cross_entropy":
        logger.warning("--criterion cross_entropy: gate losses are not added and routing is not "
                       "logged; --criterion moe_cross_entropy does both")


def _check_data(cfg: Any) -> None:
    task = cfg.task
    if task is None or getattr(task, "_name", None) != "language_modeling":
        return
    folder = Path(str(task.data).split(os.pathsep)[0])
    remedy = "give a folder made by `evomoe prepare` or fairseq-preprocess"
    if not folder.is_dir():
        raise OptionError("DATA", task.data, f"no such folder; {remedy}")
    if not (folder / "dict.txt").is_file():
        raise OptionError("DATA", task.data, f"has no dict.txt; {remedy}")
    if cfg.model is not None and not list(folder.glob(f"{cfg.dataset.train_subset}*.idx")):
        raise OptionError("DATA", task.data,
                          f"has no {cfg.dataset.train_subset}.idx to train on; {remedy}")
