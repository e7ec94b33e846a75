"""Supervised fine-tuning: language modeling in which answers are learned and prompts are read."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import check_number
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.data.sft_dataset import SFTDataset, scoring_examples
from evomoe_plugin.data.sft_examples import Encoder, load_examples
from evomoe_plugin.data.turns import Templates
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


@dataclass
class LanguageModelingSFTConfig(FairseqDataclass):
    """`data` is positional on the command line."""

    data: Optional[str] = field(
        default=None,
        metadata={"help": "folder with train.jsonl and valid.jsonl, and dict.txt and the tokenizer "
                          "that the model was trained with"},
    )
    tokens_per_sample: int = field(
        default=1024,
        metadata={"help": "tokens of an example, or of a row with --pack-examples; of longer "
                          "examples the prompt is cut from the left, then the answer from the "
                          "right"},
    )
    max_target_positions: Optional[int] = field(
        default=None,
        metadata={"help": "positions that the model has (default: --tokens-per-sample)"},
    )
    add_bos_token: bool = field(default=False, metadata={"help": "not supported"})
    train_on_prompt: bool = field(
        default=False, metadata={"help": "learn the tokens of prompts too"}
    )
    pack_examples: bool = field(
        default=False,
        metadata={"help": "put several examples into a row; they do not attend to each other"},
    )
    moe_aux_balance_weight: float = field(
        default=1.0,
        metadata={"help": "weight of the tokens of answers in the gates' auxiliary losses; those "
                          "of prompts weigh 1"},
    )
    prompt_template: str = field(
        default=Templates.prompt, metadata={"help": "what stands around prompts; {} is the prompt"}
    )
    response_template: str = field(
        default=Templates.response, metadata={"help": "what stands around responses"}
    )
    system_template: str = field(
        default=Templates.system, metadata={"help": "what stands around a chat's system messages"}
    )
    user_template: str = field(
        default=Templates.user, metadata={"help": "what stands around a chat's user messages"}
    )
    assistant_template: str = field(
        default=Templates.assistant,
        metadata={"help": "what stands around a chat's answers; what stands before {} is not "
                          "learned"},
    )


@register_task("language_modeling_sft", dataclass=LanguageModelingSFTConfig)
class LanguageModelingSFTTask(LanguageModelingTask):
    """Fine-tune a language model on prompts with responses, or on chats (docs/sft.md).

    Loss, perplexity and gradients are per token learned: those of answers and of the
    end-of-sentence after each.
    """

    def __init__(self, args: Any, dictionary: Dictionary, encoder: Encoder, templates: Templates):
        super().__init__(args, dictionary)
        self.encoder = encoder
        self.templates = templates

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "LanguageModelingSFTTask":
        """Load dictionary and tokenizer.

        Raises:
            OptionError: an option cannot work, or a file is missing or unfit.
        """
        check_number(args, "tokens_per_sample", least=1, remedy="give 1 or more")
        check_number(args, "moe_aux_balance_weight", least=0, remedy="give a weight of 0 or more")
        positions = args.max_target_positions
        if positions is not None and args.tokens_per_sample > positions:
            raise OptionError("tokens_per_sample", args.tokens_per_sample,
                              f"give at most --max-target-positions ({positions})")
        if args.add_bos_token:
            raise OptionError("add_bos_token", True, "examples begin with </s>, as fairseq begins "
                              "to generate without it: leave it out")
        templates = Templates(*(getattr(args, f"{role}_template") for role in
                                ("prompt", "response", "system", "user", "assistant")))
        templates.validate()
        folder = Path(str(args.data))
        remedy = ("give a folder with train.jsonl, valid.jsonl, and dict.txt and the tokenizer "
                  "that the model was trained with")
        if not folder.is_dir():
            raise OptionError("DATA", args.data, f"no such folder; {remedy}")
        if not (folder / "dict.txt").is_file():
            raise OptionError("DATA", args.data, f"has no dict.txt; {remedy}")
        dictionary = load_dictionary("DATA", folder / "dict.txt")
        logger.info("dictionary: %s types", f"{len(dictionary):,}")
        return cls(args, dictionary, Encoder(folder, dictionary), templates)

    def build_model(self, args: Any, from_checkpoint: bool = False):
        """Build the model.

        Raises:
            OptionError: it is not ours, and cannot do what an option asks for.
        """
        model = super().build_model(args, from_checkpoint)
        if not isinstance(model.decoder, MoEDecoder):
            for option in ("pack_examples", "moe_aux_balance_weight"):
                value = getattr(self.args, option)
                if value != getattr(LanguageModelingSFTConfig, option):
                    raise OptionError(option, value,
                                      "only the MoE architectures can do it: leave it out")
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Tokenize SPLIT.jsonl.

        Raises:
            OptionError: there is no such file, or a line of it is malformed.
        """
        path = Path(self.args.data) / f"{split}.jsonl"
        if not path.is_file():
            raise OptionError("DATA", self.args.data, f"has no {path.name}; name the files of "
                              "--train-subset, --valid-subset and --gen-subset so")
        row_size = self.args.tokens_per_sample
        examples = load_examples(path, self.encoder, self.templates, row_size)
        dataset = SFTDataset(
            examples, self.dictionary, train_on_prompt=self.args.train_on_prompt,
            answer_weight=self.args.moe_aux_balance_weight,
            row_size=row_size if self.args.pack_examples else None,
        )
        if self.args.pack_examples:
            logger.info("%s: packed into %s rows, %.1f %% full", path, f"{len(dataset):,}",
                        100 * dataset.sizes.sum() / (len(dataset) * row_size))
        self.datasets[split] = dataset

    def eval_lm_dataloader(self, dataset: SFTDataset, *args: Any, max_positions: Any = None,
                           context_window: int = 0, **kwargs: Any):
        """Batches for fairseq-eval-lm, whose perplexity is then that of the answers.

        Raises:
            OptionError: there is no context window here, or an example is too long for the model.
        """
        if context_window:
            raise OptionError("context_window", context_window,
                              "every answer is read with all of its prompt: leave it out")
        longest = max(map(len, dataset.examples))
        if max_positions is not None and longest > max_positions:
            raise OptionError("tokens_per_sample", self.args.tokens_per_sample,
                              f"an example has {longest} tokens, and the model {max_positions} "
                              "positions: give at most that many")
        whole = self.args.train_on_prompt
        scored = SFTDataset(
            dataset.examples if whole else scoring_examples(dataset.examples), self.dictionary,
            train_on_prompt=whole, scored=True,
        )
        return super().eval_lm_dataloader(scored, *args, max_positions=max_positions, **kwargs)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Generate what follows each prompt: for the rows of a file, the first answer.

        Raises:
            OptionError: rows hold several examples, or prompts are learned too.
        """
        if "segments" in sample["net_input"]:
            raise OptionError("pack_examples", True,
                              "prompts are answered one by one: leave it out")
        if sample.get("target") is not None and prefix_tokens is None:
            sample = {**sample, "net_input": self._prompts(sample)}
        return super().inference_step(generator, models, sample, prefix_tokens, constraints)

    def _prompts(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.args.train_on_prompt:
            raise OptionError("train_on_prompt", True,
                              "says that there are no prompts to go on from: leave it out")
        pad = self.dictionary.pad()
        # The input at the first target is the prompt's last token.
        lengths = (sample["target"] != pad).int().argmax(1) + 1
        tokens = sample["net_input"]["src_tokens"][:, : int(lengths.max())]
        columns = torch.arange(tokens.size(1), device=tokens.device)
        tokens = tokens.masked_fill(columns >= lengths.unsqueeze(1), pad)
        return {"src_tokens": tokens, "src_lengths": lengths}
