"""`modeling_evomoe` as a model of transformers, for both families of decoders."""

import json

import pytest
import torch

from tests.export.decoders import LLAMA, PHI, tokens
from tests.gates.test_every_gate import label
from tests.models.hf_models import LINEAR, LLAMA3, YARN

TOP_P = {**LLAMA, "moe_gate": "top_p"}
PHI = {**PHI, "moe_gate": "top_p", "activation_fn": "relu_squared"}
# Of each family, with a gate that reads token ids.
FAMILIES = {
    "gpt": {"moe_gate": "hash", "decoder_learned_pos": True},
    "llama": {**LLAMA, "moe_gate": "hash", "decoder_qk_norm": "shared", "rope_fraction": 0.5},
}
BOTH = pytest.mark.parametrize("given", FAMILIES.values(), ids=FAMILIES)


def scaling(rope):
    return json.dumps({name: value for name, value in rope.items() if name != "rope_theta"})


@pytest.mark.parametrize(
    "given",
    [
        TOP_P,
        PHI,
        {**PHI, "share_decoder_input_output_embed": True, "moe_shared_experts": 2},
        *({**TOP_P, "decoder_qk_norm": kind} for kind in ("shared", "separate", "joint")),
        *({**TOP_P, "rope_scaling": scaling(rope)} for rope in (LINEAR, LLAMA3, YARN)),
        {**TOP_P, "decoder_head_dim": 12, "rope_theta": 100.0, "decoder_norm_eps": 0.01},
        {**TOP_P, "moe_gate": "dense_to_sparse", "moe_null_experts": 1, "moe_lexical": "normal:1"},
        {**TOP_P, "moe_gate": "top_k", "moe_spawn_updates": 30, "moe_shared_experts": 1},
        {"arch": "causal_lm", "moe_layers": "none", "rope_fraction": 0.5},
    ],
    ids=label,
)
@torch.no_grad()
def test_logits_of_decoders_of_llamas_kind(make_trained, exported, given):
    trained, x = make_trained(20, **given), tokens(3, 40)
    wanted = trained.model(x)[0]
    model = exported(trained)
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(x).logits, wanted, rtol=0, atol=1e-5)
    # Padding on either side, and a cache.
    pad, ones = torch.ones(3, 4, dtype=torch.int64), torch.ones_like(x)
    left = model(torch.cat([pad, x], 1), attention_mask=torch.cat([pad * 0, ones], 1)).logits
    torch.testing.assert_close(left[:, 4:], wanted, rtol=0, atol=1e-5)
    first = model(x[:, :17], use_cache=True)
    second = model(x[:, 17:], past_key_values=first.past_key_values)
    parts = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(parts, wanted, rtol=0, atol=1e-5)


@BOTH
@torch.no_grad()
def test_attention_by_name(make_trained, exported, transformers, given, tmp_path):
    model, x = exported(make_trained(20, **given)), tokens(2)
    assert model.config._attn_implementation == "sdpa"
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", trust_remote_code=True, attn_implementation="eager"
    )
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    by_sdpa = model(x, attention_mask=mask)
    by_eager = eager(x, attention_mask=mask, output_attentions=True)
    kept = mask.bool()
    torch.testing.assert_close(by_eager.logits[kept], by_sdpa.logits[kept], rtol=0, atol=1e-5)
    assert by_sdpa.attentions is None
    weights = by_eager.attentions[0]
    assert weights.shape == (2, model.config.num_attention_heads, 11, 11)
    assert torch.allclose(weights[1].sum(-1), torch.ones(()))
    assert not weights[1].triu(1).any() and not weights[0, :, 3:, :3].any()
    assert model._supports_flash_attn  # which needs a GPU


@BOTH
@torch.no_grad()
def test_hidden_states_and_tuples(make_trained, exported, given):
    trained, x = make_trained(20, **given), tokens()
    model = exported(trained)
    output = model(x, output_hidden_states=True)
    states, inner = output.hidden_states, trained.model(x)[1]["inner_states"]
    assert len(states) == len(inner) == 1 + model.config.num_hidden_layers
    for theirs, ours in zip(states[:-1], inner[:-1], strict=True):
        torch.testing.assert_close(theirs, ours.transpose(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(model.output_projection(states[-1]), output.logits)
    assert model(x).hidden_states is None
    loss, logits = model(x, labels=x, return_dict=False)
    assert torch.equal(logits, output.logits) and torch.equal(loss, model(x, labels=x).loss)
    model.config.return_dict = False
    assert torch.equal(model(x)[0], logits) and isinstance(model(x), tuple)


@BOTH
@torch.no_grad()
def test_a_static_cache_generates_the_same(make_trained, exported, given):
    model, x = exported(make_trained(20, **given)), tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9}
    wanted = model.generate(x, do_sample=False, **settings)
    static = model.generate(x, do_sample=False, cache_implementation="static", **settings)
    assert torch.equal(static, wanted)


@BOTH
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_added_tokens(make_trained, exported, transformers, tmp_path, given, tied):
    trained = make_trained(20, **given, share_decoder_input_output_embed=tied)
    model = exported(trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "exported", trust_remote_code=True
    )
    assert tokenizer.add_tokens(["<new>", "<newer>"]) == 2
    ids = tokenizer("w1 <new> w2 <newer>", return_tensors="pt")["input_ids"]
    assert ids[0, 2].item() == 40 and ids[0, 4].item() == 41
    before = model(tokens()).logits
    assert model.resize_token_embeddings(len(tokenizer)).weight.size(0) == 42
    assert (model.output_projection.weight is model.embed_tokens.weight) == tied
    assert model.layers[0].moe.gate.table.tolist()[40:] == [40 % 5, 41 % 5]
    logits = model(ids).logits
    assert logits.shape == (1, 5, 42) and logits.isfinite().all()
    torch.testing.assert_close(model(tokens()).logits[..., :40], before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "grown")
    grown = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grown", trust_remote_code=True
    )
    assert torch.equal(grown(ids).logits, logits)


@torch.no_grad()
def test_lexical_logits_of_added_tokens(make_trained, exported):
    model = exported(make_trained(**{**LLAMA, "moe_gate": "top_k", "moe_lexical": "normal:1"}))
    model.resize_token_embeddings(44)
    logits = model.layers[0].moe.gate.lexical_logits
    assert logits.shape == (44, 5) and logits[:40].any() and not logits[40:].any()
    assert model(torch.tensor([[43, 5]])).logits.shape == (1, 2, 44)
