"""Build the plugin's models, criterion and fairseq's trainer from the options of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import evomoe_plugin
from evomoe_plugin.trainer.moe_trainer import MoETrainer

evomoe_plugin.register()  # whichever of the two was imported first


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT with an MoE layer in every block, and of its batch."""

    layers: int
    width: int
    experts: int
    batch: int = 8
    length: int = 256
    vocabulary: int = 8192
    top_k: int = 2

    @property
    def ffn(self) -> int:
        """F of GELU experts."""
        return 4 * self.width

    @property
    def heads(self) -> int:
        """Number of heads of 64 dimensions."""
        return max(1, self.width // 64)

    @property
    def tokens(self) -> int:
        """T of an update."""
        return self.batch * self.length

    @property
    def name(self) -> str:
        """Name in tables."""
        return (
            f"{self.layers} layers, D {self.width}, {self.experts} experts, "
            f"{self.batch} × {self.length} tokens"
        )


@dataclass
class Run:
    """The objects of a run."""

    config: Any
    task: Any
    model: Any
    criterion: Any

    def trainer(self) -> MoETrainer:
        """fairseq's trainer, ready for `train_step`."""
        trainer = MoETrainer(self.config, self.task, self.model, self.criterion)
        trainer.lr_step_begin_epoch(1)
        return trainer


def build(sizes: Sizes, given: Iterable[Any]) -> Run:
    """A GPT of these sizes without dropout, with shared embeddings; `given` are further options."""
    with tempfile.TemporaryDirectory() as data:
        dictionary = Dictionary()
        for n in range(sizes.vocabulary - len(dictionary)):
            dictionary.add_symbol(f"w{n}")
        dictionary.save(str(Path(data) / "dict.txt"))
        line = list(
            map(
                str,
                (
                    data,
                    "--task",
                    "language_modeling",
                    "--arch",
                    "transformer_lm_moe",
                    "--criterion",
                    "moe_cross_entropy",
                    "--moe-freq",
                    1,
                    "--moe-expert-count",
                    sizes.experts,
                    "--activation-fn",
                    "gelu",
                    "--decoder-layers",
                    sizes.layers,
                    "--decoder-embed-dim",
                    sizes.width,
                    "--decoder-ffn-embed-dim",
                    sizes.ffn,
                    "--decoder-attention-heads",
                    sizes.heads,
                    "--dropout",
                    0,
                    "--attention-dropout",
                    0,
                    "--share-decoder-input-output-embed",
                    "--tokens-per-sample",
                    sizes.length,
                    "--max-target-positions",
                    sizes.length,
                    "--optimizer",
                    "fused_adamw",
                    "--lr",
                    1e-4,
                    "--weight-decay",
                    0.1,
                    *given,
                ),
            )
        )
        with mock.patch("sys.argv", ["fairseq-train", *line]):
            parsed = options.parse_args_and_arch(options.get_training_parser(), line)
        config = convert_namespace_to_omegaconf(parsed)
        task = tasks.setup_task(config.task)
    torch.manual_seed(0)
    return Run(config, task, task.build_model(config.model), task.build_criterion(config.criterion))


def sample(sizes: Sizes, device: str = "cpu") -> dict[str, Any]:
    """A batch of random tokens, in the format of the task's data."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        4, sizes.vocabulary, (sizes.batch, sizes.length + 1), generator=generator
    ).to(device)
    return {
        "id": torch.arange(sizes.batch, device=device),
        "nsentences": sizes.batch,
        "ntokens": sizes.tokens,
        "target": tokens[:, 1:].contiguous(),
        "net_input": {
            "src_tokens": tokens[:, :-1].contiguous(),
            "src_lengths": torch.full((sizes.batch,), sizes.length, device=device),
        },
    }
