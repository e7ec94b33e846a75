import pytest
import torch
from fairseq.models.transformer import transformer_decoder
from fairseq.modules import PositionalEmbedding

import evomoe_plugin  # noqa: F401

LENGTH, WIDTH = 9, 6


@pytest.mark.parametrize("padding", [0, 5, 40_000])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "sinusoidal"])
def test_positions_are_those_of_the_stock_padding_index(padding, learned):
    torch.manual_seed(1)
    stock = PositionalEmbedding(LENGTH, WIDTH, 1, learned=learned)
    torch.manual_seed(1)
    table = transformer_decoder.PositionalEmbedding(LENGTH, WIDTH, padding, learned=learned)
    weights = table.weight if learned else table.weights
    assert weights.shape == (LENGTH + 2, WIDTH)
    assert table.state_dict().keys() == stock.state_dict().keys()
    assert table.max_positions == stock.max_positions

    tokens = torch.tensor([[7, 1, 3, padding], [padding, padding, 1, 50_000]])
    stock_tokens = torch.where(tokens == padding, 1, 2)
    assert torch.equal(table(tokens), stock(stock_tokens))
    for step in range(1, 4):
        found = table(tokens[:, :step], incremental_state={})
        assert torch.equal(found, stock(stock_tokens[:, :step], incremental_state={}))
    with torch.no_grad():
        found = table(tokens)
    assert (found[tokens == padding] == 0).all() and (found[tokens != padding] != 0).any()


@pytest.mark.parametrize("learned", [True, False])
def test_fairseqs_own_dictionary_gets_its_own_tables(learned):
    table = transformer_decoder.PositionalEmbedding(LENGTH, WIDTH, 1, learned=learned)
    assert type(table) is type(PositionalEmbedding(LENGTH, WIDTH, 1, learned=learned))
