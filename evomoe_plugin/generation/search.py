"""Search strategies for fairseq's generator: prompts of different lengths in one batch, each with
the result that it has alone."""

from __future__ import annotations

import torch
from fairseq.data import Dictionary
from fairseq.search import BeamSearch, Search
from torch import Tensor

from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.routing.noise import fold, uniform


class Prompts:
    """The tokens allowed for each prompt at each step.

    fairseq's generator aligns prompts at their beginning and forces their tokens, so positions are
    right. But it limits all of them to one length, that of the batch, and suppresses tokens only
    once no prompt of the batch is left to read: results would depend on the other prompts.

    Args:
        size: of the dictionary, V.
        lengths_P: int64, tokens of each prompt.
        limits_P: int64, maximum length, prompt included.
        never: token ids that are never generated.
        end: the token id that ends a text.
        stops: token ids after which a text ends; `end` is never generated otherwise. Empty: it ends
            with `end`.
    """

    def __init__(
        self,
        size: int,
        lengths_P: Tensor,
        limits_P: Tensor,
        never: list[int],
        end: int,
        stops: list[int],
    ):
        self.lengths_P, self.limits_P, self.end, self.stops = lengths_P, limits_P, end, stops
        device = lengths_P.device
        tokens_V = torch.arange(size, device=device)
        self.never_V = torch.isin(tokens_V, torch.tensor(never, device=device))
        self.text_V = tokens_V != end
        self._stops = torch.tensor(stops, dtype=torch.int64, device=device)

    def restrict(
        self, step: int, lprobs: Tensor, numbers_B: Tensor, tokens: Tensor | None
    ) -> Tensor:
        """Log-probabilities [B, beams, V], -inf for tokens that are not allowed.

        Args:
            step: position of the next token, from 0.
            numbers_B: the prompt of each row.
            tokens: int64 [B * beams, step + 1], those before.
        Raises:
            RunFailed: the model's output is NaN/Inf.
        """
        if (lprobs.amax(-1) == float("-inf")).any():
            raise RunFailed("the model's output is NaN/Inf: use an earlier checkpoint")
        free_B = step >= self.lengths_P[numbers_B]
        ends_B = step >= self.limits_P[numbers_B]
        excluded_BV = (free_B[:, None] & self.never_V) | (ends_B[:, None] & self.text_V)
        lprobs = lprobs.masked_fill(excluded_BV.unsqueeze(1), float("-inf"))
        if self.stops:
            assert tokens is not None
            stopped = torch.isin(tokens[:, -1], self._stops).view(lprobs.shape[:2])
            stopped &= (step > self.lengths_P[numbers_B]).unsqueeze(1)
            ended = stopped | ends_B.unsqueeze(1)
            # Certain, so that a text's score is that of its tokens.
            certain_V = torch.where(self.text_V, float("-inf"), 0.0)
            lprobs = torch.where(ended.unsqueeze(2), certain_V, lprobs)
        return lprobs


class PromptedBeamSearch(BeamSearch):
    """fairseq's beam search, greedy with one beam."""

    def __init__(self, dictionary: Dictionary, prompts: Prompts):
        super().__init__(dictionary)
        self.prompts = prompts

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """As upstream: scores, tokens and beams of the candidates, [B, 2 * beams] each."""
        lprobs = self.prompts.restrict(step, lprobs, original_batch_idxs, prev_output_tokens)
        return super().step(step, lprobs, scores)


class KeyedSampling(Search):
    """Sampling with one random number per (seed, prompt, token).

    The number is a hash, independent of the batch. It selects a token by inverse transform sampling
    from the distribution sorted by probability and truncated to the k most probable tokens, then to
    the smallest set with total probability p (Holtzman et al., arXiv 1904.09751). fairseq's own
    sampling draws from torch's generator, row by row.

    Args:
        top_k: 0: all.
        top_p: 1: all.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        prompts: Prompts,
        seed: int,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__(dictionary)
        self.prompts, self.seed, self.top_k, self.top_p = prompts, seed, top_k, top_p

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """As upstream, for one beam: score, token and beam 0, [B, 1] each."""
        numbers_B = original_batch_idxs
        lprobs = self.prompts.restrict(step, lprobs, numbers_B, prev_output_tokens)[:, 0]
        ranked, tokens = lprobs.sort(dim=1, descending=True, stable=True)
        if self.top_k:
            ranked[:, self.top_k :] = float("-inf")
        probs = ranked.double().softmax(1)
        before = probs.cumsum(1) - probs
        probs = probs.masked_fill(before >= self.top_p, 0.0)
        key = fold(torch.zeros((), dtype=torch.int64, device=lprobs.device), self.seed)
        keys_B = fold(fold(key, numbers_B), step - self.prompts.lengths_P[numbers_B])
        sums = probs.cumsum(1)
        drawn = uniform(keys_B, 1).double() * sums[:, -1:]
        index = (sums <= drawn).sum(1, keepdim=True).clamp(max=probs.size(1) - 1)
        score = ranked.gather(1, index)
        if step > 0:
            score = score + scores[:, :, step - 1]
        return score, tokens.gather(1, index), torch.zeros_like(index)
