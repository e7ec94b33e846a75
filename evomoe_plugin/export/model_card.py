"""The model card of an exported folder, README.md: only what checkpoint and data folder say."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from evomoe_plugin import __version__
from evomoe_plugin.data.card import DataCard
from evomoe_plugin.export.shards import Planned
from evomoe_plugin.generation.loading import TrainedModel

# Of a run, beside the options of its model: configuration group, field.
_RUN = (
    ("task", "_name"),
    ("task", "tokens_per_sample"),
    ("criterion", "_name"),
    ("criterion", "moe_gate_loss_wt"),
    ("optimizer", "_name"),
    ("optimizer", "adam_betas"),
    ("optimizer", "weight_decay"),
    ("lr_scheduler", "_name"),
    ("lr_scheduler", "warmup_updates"),
    ("optimization", "lr"),
    ("optimization", "clip_norm"),
    ("optimization", "update_freq"),
    ("optimization", "max_update"),
    ("dataset", "batch_size"),
    ("dataset", "max_tokens"),
    ("distributed_training", "distributed_world_size"),
    ("common", "fp16"),
    ("common", "bf16"),
    ("common", "seed"),
)
# Names of the training log (docs/options.md) and what they mean.
_ROUTING = {
    "experts_per_token": "experts that compute a token, on average",
    "load_max": "load of the busiest expert, divided by the mean load",
    "load_cv2": "squared coefficient of variation of the experts' loads",
    "dead_experts": "share of experts without a token in a batch",
    "gate_entropy": "entropy of the gate's probabilities, in nats",
    "null_rate": "null experts selected per token",
    "overflow": "share of (token, expert) pairs that were dropped",
}


def model_card(
    trained: TrainedModel,
    format: str,
    name: str,
    tensors: Sequence[Planned],
    tokenizer_has_code: bool = False,
) -> str:
    """The card in Markdown, with the header that Hugging Face reads.

    Args:
        format: a `model_type` of transformers, or evomoe.
        name: of the model, its heading.
        tensors: that are written.
        tokenizer_has_code: whether the folder has the tokenizer's code.
    """
    code = ", trust_remote_code=True" if format == "evomoe" else ""
    tokenizer_code = ", trust_remote_code=True" if code or tokenizer_has_code else ""
    dtype = str(trained.dtype).removeprefix("torch.")
    parameters = sum(math.prod(t.shape) for t in tensors if t.dtype.is_floating_point)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- mixture-of-experts\n- evomoe\n---\n",
        f"# {name}\n",
        f"A language model of {parameters:,} parameters in {dtype}, trained by fairseq with "
        f"evomoe_plugin {__version__}, as transformers' `{format}`"
        + (" (its code is in this folder).\n" if code else ".\n"),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}{tokenizer_code})\n```\n",
        "## Architecture\n",
        _table(("layer", "experts", "gate"), _layers(trained)),
        "## Training\n",
        f"{trained.num_updates:,} updates. The options that differ from the architecture's "
        "defaults, and the run's:\n",
        _table(("option", "value"), _recipe(trained.cfg)),
        "## Routing\n",
        _routing(trained),
        "## Evaluation\n",
        _evaluation(trained),
        "## Data\n",
        _data(trained),
    ]
    return "\n".join(parts)


def _layers(trained: TrainedModel) -> Iterable[tuple[Any, ...]]:
    for n, layer in enumerate(trained.model.decoder.layers):
        moe = getattr(layer, "moe", None)
        if moe is None or moe.in_dense_phase:
            yield n, "one FFN", "–"
            continue
        shared = "" if moe.shared is None else f", {moe.shared.experts.num_experts} shared"
        null = f", {moe.gate.info.num_null} null" if moe.gate.info.num_null else ""
        width = moe.experts.fc1_weight.size(1)
        gate = getattr(trained.cfg.model, "moe_gate", "–")
        yield n, f"{moe.num_experts} of width {width}{shared}{null}", gate


def _recipe(cfg: Any) -> Iterable[tuple[str, Any]]:
    model = _plain(getattr(cfg, "model", {}))
    arch = model.get("_name") or model.get("arch")
    yield "--arch", arch
    registered = MODEL_DATACLASS_REGISTRY.get(arch)
    defaults = vars(registered()) if registered else {}
    for name, value in sorted(model.items()):
        if (
            name in defaults
            and name != "_name"
            and not isinstance(value, (dict, list))
            and value != defaults[name]
        ):
            if isinstance(value, str) and os.path.isabs(value):
                value = os.path.basename(value)  # a path of the machine that trained
            if value is not None and not str(defaults[name]).startswith("${"):
                yield _flag(name), value
    for group, name in _RUN:
        value = _plain(getattr(cfg, group, None) or {}).get(name)
        if value not in (None, False):
            yield (f"--{group.replace('_', '-')}" if name == "_name" else _flag(name)), value


def _plain(group: Any) -> Mapping[str, Any]:
    if OmegaConf.is_config(group):
        group = OmegaConf.to_container(group, resolve=True, enum_to_str=True)
    return group if isinstance(group, Mapping) else vars(group)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _routing(trained: TrainedModel) -> str:
    for subset, means in _validations(trained):
        if rows := [(k, f"{means[k]:.4g}", why) for k, why in _ROUTING.items() if k in means]:
            return (
                f"On the split `{subset}`, in the last validation before the checkpoint:\n\n"
                + _table(("statistic", "value", "meaning"), rows)
            )
    return "The checkpoint records no statistics of routing.\n"


def _evaluation(trained: TrainedModel) -> str:
    lines = []
    for subset, means in _validations(trained):
        # In bits; the first has no auxiliary losses.
        bits = next((means[k] for k in ("inner_loss", "nll_loss", "loss") if k in means), None)
        if bits is not None:
            lines.append(
                f"Perplexity per token on the split `{subset}`, in the last validation before the "
                f"checkpoint: {2**bits:.2f}.\n"
            )
    return "\n".join(lines) or "The checkpoint records no perplexity.\n"


def _validations(trained: TrainedModel) -> Iterable[tuple[str, Mapping[str, float]]]:
    """Splits and the means of their meters, those that have data."""
    groups = trained.extra_state.get("metrics") or {}
    dataset = _plain(getattr(trained.cfg, "dataset", None) or {})
    for subset in str(dataset.get("valid_subset") or "valid").split(","):
        means = {}
        for _priority, key, _kind, meter in groups.get(subset) or ():
            total, count = meter.get("sum"), meter.get("count")
            if count and total is not None and math.isfinite(mean := float(total) / float(count)):
                means[key] = mean
        yield subset, means


def _data(trained: TrainedModel) -> str:
    card = DataCard.load(trained.folder)
    if card is None:
        return "The data folder has no data card.\n"
    source = card.options.get("source") or "Source not stated."
    splits = (
        (name, f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['bytes']:,}")
        for name, s in card.splits.items()
    )
    return (
        f"{source} Tokenizer: {card.tokenizer['kind']}, {card.tokenizer['rows']:,} entries.\n\n"
        + _table(("split", "documents", "tokens", "bytes of text"), splits)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
