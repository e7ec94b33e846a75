"""Supervised fine-tuning: language modeling with responses as targets and prompts as context."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.values import check_number
from evomoe_plugin.data.chat_template import ChatTemplate, chat_template_of
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.data.sft_dataset import SFTDataset, scoring_examples
from evomoe_plugin.data.sft_examples import Encoder, load_examples
from evomoe_plugin.data.sft_files import file_of_split
from evomoe_plugin.data.turns import ROLES, Templates
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class LanguageModelingSFTConfig(FairseqDataclass):
    """`data` is positional on the command line."""

    data: Optional[str] = _option(
        None,
        "folder with train.jsonl and valid.jsonl, and dict.txt and the tokenizer that the "
        "model was trained with (docs/sft.md has other formats)",
    )
    tokens_per_sample: int = _option(
        1024,
        "maximum tokens of an example, or of a row with --pack-examples; in longer examples "
        "the prompt is cut from the left, then the response from the right",
    )
    max_target_positions: Optional[int] = _option(
        None, "positions of the model (default: --tokens-per-sample)"
    )
    add_bos_token: bool = _option(False, "not supported")
    train_on_prompt: bool = _option(False, "train on prompt tokens too")
    pack_examples: bool = _option(
        False, "put several examples into a row; they do not attend to each other"
    )
    moe_aux_balance_weight: float = _option(
        1.0, "weight of response tokens in the gates' auxiliary losses; prompt tokens have 1"
    )
    chat_template: Optional[str] = _option(
        None,
        "file with the Jinja template of chats; none: the templates of roles below (default: that "
        "of the tokenizer, if it has one)",
    )
    prompt_template: str = _option(Templates.prompt, "text around prompts; {} is the prompt")
    response_template: str = _option(Templates.response, "text around responses")
    system_template: str = _option(Templates.system, "text around a chat's system messages")
    user_template: str = _option(Templates.user, "text around a chat's user messages")
    assistant_template: str = _option(
        Templates.assistant, "text around a chat's responses; text before {} is not trained on"
    )


@register_task("language_modeling_sft", dataclass=LanguageModelingSFTConfig)
class LanguageModelingSFTTask(LanguageModelingTask):
    """Fine-tune a language model on prompts with responses, or on chats (docs/sft.md).

    Loss, perplexity and gradients are per target token: those of responses and the end-of-sentence
    after each.

    Attributes:
        has_context: whether batches have tokens that are no targets, or weights of tokens.
    """

    def __init__(
        self,
        args: Any,
        dictionary: Dictionary,
        encoder: Encoder,
        templates: Templates,
        chat_template: Optional[ChatTemplate],
    ):
        super().__init__(args, dictionary)
        self.encoder, self.templates, self.chat_template = encoder, templates, chat_template
        self.has_context = not args.train_on_prompt or args.moe_aux_balance_weight != 1

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "LanguageModelingSFTTask":
        """Load dictionary and tokenizer.

        Raises:
            OptionError: an option is invalid, or a file is missing or does not fit.
        """
        check_number(args, "tokens_per_sample", "[1, inf)", "give 1 or more")
        check_number(args, "moe_aux_balance_weight", "[0, inf)", "give a weight of 0 or more")
        positions = args.max_target_positions
        if positions is not None and args.tokens_per_sample > positions:
            raise OptionError(
                "tokens_per_sample",
                args.tokens_per_sample,
                f"give at most --max-target-positions ({positions})",
            )
        if args.add_bos_token:
            fault = "examples start with </s>, or as the tokenizer starts texts: omit it"
            raise OptionError("add_bos_token", True, fault)
        templates = Templates(*(getattr(args, f"{f.name}_template") for f in fields(Templates)))
        templates.validate()
        folder = Path(str(args.data))
        remedy = (
            "give a folder with train.jsonl, valid.jsonl, and dict.txt and the tokenizer "
            "that the model was trained with"
        )
        if args.data is None:
            raise OptionError("DATA", "is missing", f"{remedy}; with Hydra, task.data=FOLDER")
        for path, fault in ((folder, "no such folder"), (folder / "dict.txt", "has no dict.txt")):
            if not path.exists():
                raise OptionError("DATA", args.data, f"{fault}; {remedy}")
        dictionary = load_dictionary("DATA", folder / "dict.txt")
        logger.info("dictionary: %s types", f"{len(dictionary):,}")
        encoder = Encoder(folder, dictionary)
        chat_template = chat_template_of(encoder.tokenizer, args.chat_template, folder)
        if chat_template is not None:
            for role in ROLES:
                if (given := getattr(templates, role)) != getattr(Templates, role):
                    fault = f"chats are written by the chat template {chat_template.name}: omit it"
                    fault += ", or give --chat-template none"
                    raise OptionError(f"{role}_template", repr(given), fault)
        return cls(args, dictionary, encoder, templates, chat_template)

    def build_model(self, args: Any, from_checkpoint: bool = False):
        """Build the model.

        Raises:
            OptionError: a model of stock fairseq does not support an option.
        """
        model = super().build_model(args, from_checkpoint)
        if not isinstance(model.decoder, MoEDecoder):
            for option in ("pack_examples", "moe_aux_balance_weight"):
                value = getattr(self.args, option)
                if value != getattr(LanguageModelingSFTConfig, option):
                    raise OptionError(option, value, "only MoE architectures support it: omit it")
        return model

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Tokenize a split.

        Raises:
            OptionError: no such file, a malformed record, or a chat template that fails.
        """
        path = file_of_split(Path(self.args.data), split)
        row_size = self.args.tokens_per_sample
        try:
            examples = load_examples(
                path, self.encoder, self.templates, row_size, self.chat_template
            )
        finally:
            if self.chat_template is not None:
                self.chat_template.close()
        dataset = SFTDataset(
            examples,
            self.dictionary,
            train_on_prompt=self.args.train_on_prompt,
            response_weight=self.args.moe_aux_balance_weight,
            row_size=row_size if self.args.pack_examples else None,
        )
        if self.args.pack_examples:
            logger.info(
                "%s: packed into %s rows, %.1f %% full",
                path,
                f"{len(dataset):,}",
                100 * dataset.sizes.sum() / (len(dataset) * row_size),
            )
        self.datasets[split] = dataset

    def eval_lm_dataloader(
        self,
        dataset: SFTDataset,
        *args: Any,
        max_positions: Any = None,
        context_window: int = 0,
        **kwargs: Any,
    ):
        """Batches for fairseq-eval-lm, which then reports the perplexity of responses.

        Raises:
            OptionError: a context window is given, or an example is too long for the model.
        """
        if context_window:
            raise OptionError(
                "context_window",
                context_window,
                "every response is scored with its full prompt: omit it",
            )
        longest = max(map(len, dataset.examples))
        if max_positions is not None and longest > max_positions:
            raise OptionError(
                "tokens_per_sample",
                self.args.tokens_per_sample,
                f"an example has {longest} tokens, the model {max_positions} "
                "positions: give at most that many",
            )
        whole = self.args.train_on_prompt
        scored = SFTDataset(
            dataset.examples if whole else scoring_examples(dataset.examples),
            self.dictionary,
            train_on_prompt=whole,
            scored=True,
        )
        return super().eval_lm_dataloader(scored, *args, max_positions=max_positions, **kwargs)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Continue each prompt; for the rows of a file, up to the first response.

        Raises:
            OptionError: rows have several examples, or prompts are targets too.
        """
        if "segments" in sample["net_input"]:
            raise OptionError("pack_examples", True, "generation needs one prompt per row: omit it")
        if sample.get("target") is None or prefix_tokens is not None:
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        prompts = self._prompts(sample)
        starts, rest = prompts["src_tokens"][:, 0], prompts["src_tokens"][:, 1:]
        if rest.eq(self.dictionary.eos()).any():
            raise OptionError(
                "DATA",
                self.args.data,
                f"prompts contain {self.dictionary.eos_word}, where fairseq's generator stops: use "
                "evomoe generate --chat",
            )
        start = int(starts[0])
        if not starts.eq(start).all():
            start = starts.repeat_interleave(generator.beam_size)
        with torch.no_grad():
            return generator.generate(
                models, {**sample, "net_input": prompts}, prefix_tokens=rest, bos_token=start
            )

    def _prompts(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.args.train_on_prompt:
            raise OptionError("train_on_prompt", True, "no prompts to continue: omit it")
        pad = self.dictionary.pad()
        # The input at the first target is the prompt's last token.
        lengths = (sample["target"] != pad).int().argmax(1) + 1
        tokens = sample["net_input"]["src_tokens"][:, : int(lengths.max())]
        columns = torch.arange(tokens.size(1), device=tokens.device)
        tokens = tokens.masked_fill(columns >= lengths.unsqueeze(1), pad)
        return {"src_tokens": tokens, "src_lengths": lengths}
