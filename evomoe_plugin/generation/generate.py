"""Continue prompts with fairseq's generator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist
from fairseq.search import Search
from fairseq.sequence_generator import SequenceGenerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.joined_forwards import joined_forwards
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.generation.options import GenerationOptions
from evomoe_plugin.generation.search import KeyedSampling, PromptedBeamSearch, Prompts
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.routing import stats as st


@dataclass(frozen=True)
class Continuation:
    """The result for one prompt, in token ids."""

    prompt: list[int]
    new: list[int]
    """Without end-of-sentence."""
    score: float
    """Mean log-probability of prompt and new tokens, in nats."""


@dataclass
class Generation:
    """The results for all prompts, and their cost."""

    continuations: list[Continuation] = field(default_factory=list)
    seconds: float = 0.0
    pairs: float = 0.0
    """Computed (token, expert) pairs, over all MoE layers."""
    routed_tokens: float = 0.0
    """Tokens routed, counted once per MoE layer."""
    experts: float = 0.0
    """Available experts, summed over those tokens."""


def generate(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    device: torch.device | str = "cpu",
    starts: Sequence[int] | None = None,
    stops: Sequence[int] = (),
) -> Generation:
    """Continue each of `prompts`, given as token ids.

    A prompt's result depends neither on the rest of its batch nor on the batch size (except for
    rounding in matmuls of another size). Each step is one position, with a key-value cache; only
    routed pairs are computed.

    With several ranks, all of which call this alike, each continues every W-th prompt, and has the
    results of all. Experts of `trained` may be sharded over ranks.

    Args:
        starts: token id before each prompt, which is not in the results; None: that of training.
        stops: token ids that end a response, and that prompts may contain; () for end-of-sentence,
            which prompts may not contain then.
    Raises:
        OptionError: options that cannot work, or a prompt that is too long or ends a text.
        RunFailed: the model's output is NaN.
    """
    dictionary, model = trained.dictionary, trained.model.to(device)
    options.validate(len(dictionary))
    longest = model.max_decoder_positions() - 2  # the start and one new token
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > longest:
            raise OptionError(
                "prompt",
                f"(number {number})",
                f"has {len(prompt)} tokens: give at "
                f"most {longest}, which leaves a position for one new token",
            )
        if not stops and dictionary.eos() in prompt:
            raise OptionError(
                "prompt",
                f"(number {number})",
                f"contains {dictionary.eos_word}, which ends a text: split it there",
            )
    lengths_P = torch.tensor([len(p) for p in prompts], device=device)
    starts_P = torch.tensor(starts or [trained.start] * len(prompts), device=device)
    limits_P = (lengths_P + options.max_new_tokens).clamp(max=longest + 1)
    never, end = trained.codec.without_text(), dictionary.eos()
    if stops:
        stops, end = [*stops, end], _end_beside(never, dictionary.pad(), prompts)
    allowed = Prompts(len(dictionary), lengths_P, limits_P, never, end, list(stops))
    search: Search = PromptedBeamSearch(dictionary, allowed)
    if options.samples:
        search = KeyedSampling(
            dictionary, allowed, options.seed, options.top_k or 0, options.top_p or 1.0
        )
    done = Generation()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(prompts), ranks)

    def count(layer: nn.Module, _inputs: object, output: tuple) -> None:
        stats = output[2]
        done.pairs += float(stats[st.PAIRS])
        done.routed_tokens += float(stats[st.TOKENS])
        done.experts += float(stats[st.EXPERTS])

    start_11 = torch.tensor([[trained.start]], device=device)
    began = time.perf_counter()
    with torch.no_grad(), joined_forwards(model, partial(model, start_11)), ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, MoELayer):
                hooks.enter_context(module.register_forward_hook(count))
        for first in range(0, len(own), options.batch_size):
            batch = own[first : first + options.batch_size]
            rows = [prompts[number] for number in batch]
            numbers = torch.tensor(batch, device=device)
            generator = SequenceGenerator(
                [model],
                dictionary,
                beam_size=options.beam,
                min_len=0,
                max_len_b=int(limits_P[numbers].max()),
                temperature=options.temperature or 1.0,
                search_strategy=search,
                eos=end,
            )
            prefix = pad_sequence(
                [torch.tensor(row, dtype=torch.int64) for row in rows],
                batch_first=True,
                padding_value=dictionary.pad(),
            ).to(device)
            found = generator.generate(
                [model],
                {
                    "id": numbers,
                    "net_input": {"src_tokens": prefix, "src_lengths": lengths_P[numbers]},
                },
                prefix_tokens=prefix,
                bos_token=starts_P[numbers].repeat_interleave(options.beam),
            )
            for row, (best, *_) in zip(rows, found, strict=True):
                tokens, length = best["tokens"].tolist()[:-1], len(row)
                if len(tokens) > length and tokens[-1] in allowed.stops:
                    del tokens[-1]
                done.continuations.append(
                    Continuation(tokens[:length], tokens[length:], float(best["score"]))
                )
    done.seconds = time.perf_counter() - began
    return done if ranks == 1 else _of_all_ranks(done, ranks)


def _end_beside(never: Sequence[int], pad: int, prompts: Sequence[Sequence[int]]) -> int:
    """A token id that no prompt contains and that is not generated, to end texts in the search.

    fairseq's generator ends a text at its end-of-sentence in the prompt, too.
    """
    used = {token for prompt in prompts for token in prompt} | {pad}
    for token in never:
        if token not in used:
            return token
    raise OptionError("chat", True, "prompts contain every token without text: remove one")


def _of_all_ranks(own: Generation, ranks: int) -> Generation:
    """The continuations of all prompts, whose cost is the sum of the ranks'."""
    parts = [own] * ranks
    dist.all_gather_object(parts, own)
    by_turns = zip_longest(*(part.continuations for part in parts))
    return Generation(
        [found for turn in by_turns for found in turn if found is not None],
        max(part.seconds for part in parts),
        sum(part.pairs for part in parts),
        sum(part.routed_tokens for part in parts),
        sum(part.experts for part in parts),
    )
