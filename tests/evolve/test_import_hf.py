"""Checkpoints made of Hugging Face models compute what transformers does."""

import pytest
import torch

from evomoe_plugin.evolve.import_hf import import_hf
from tests.evolve.dense_models import build, dictionary_of
from tests.models.hf_models import DENSE, MOE, VOCABULARY, save_hf

PAD = 1
ROUNDING = 1e-5


def imported(folder):
    return build(import_hf("DIR", str(folder)), dictionary_of(VOCABULARY))


def left_padded(lengths=(9, 5, 12)):
    """Rows of different lengths, padding first, and transformers' mask and positions."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[-length:] = torch.randint(4, VOCABULARY, (length,), generator=generator)
    mask = rows.ne(PAD)
    return rows, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(scope="module", params=[*DENSE, *MOE])
def pair(request, tmp_path_factory):
    """A model of transformers and ours."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = save_hf(folder, request.param)
    return theirs, imported(folder)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(4, VOCABULARY, (3, 40))  # beyond the positions before scaling
    wanted = theirs(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours(tokens)[0], wanted, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_left_padding_and_cached_decoding_equal_transformers(pair):
    theirs, ours = pair
    tokens, mask, positions = left_padded()
    wanted = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(tokens)[0][mask], wanted[mask], rtol=0, atol=ROUNDING)
    state, cache = {}, None
    for t in range(tokens.size(1)):
        step = ours.decoder(tokens[:, : t + 1], incremental_state=state)[0][:, 0]
        out = theirs(
            tokens[:, t : t + 1],
            attention_mask=mask[:, : t + 1].long(),
            position_ids=positions[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        real = mask[:, t]
        torch.testing.assert_close(step[real], out.logits[real, 0], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(step[real], wanted[real, t], rtol=0, atol=ROUNDING)
