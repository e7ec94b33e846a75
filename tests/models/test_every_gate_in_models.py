"""Design invariants 4, 5 and 6 on whole models, for every gate, and what each model's size is."""

import pytest
import torch
import torch.distributed as dist
from fairscale.nn import FullyShardedDataParallel
from fairscale.nn.wrap import enable_wrap

from evomoe_plugin.gates import gate_names
from evomoe_plugin.models.accounting import count_parameters

PAD = 1
GIVEN = {
    "dense_to_sparse": {
        "moe_scorer": "gmm",
        "moe_weight_scale": "unit",
        "moe_temperature_scope": "token",
        "moe_bias_update_rate": 0.1,
    },
    "expert_choice": {"moe_allow_noncausal": True},
    "gshard": {"moe_capacity_factor": 0.5},
    "stable": {"moe_stable_updates": 10},
    "switch": {
        "moe_capacity_factor": 0.8,
        "moe_drop_policy": "probs",
        "moe_lexical": "normal:2",
        "moe_lexical_decay_updates": 50,
        "moe_gate_warmup_updates": 20,
        "moe_gate_centre": 0.9,
        "moe_weight_scale": "mean",
    },
    "top_any": {"moe_max_experts": 6, "moe_adapt_record_interval": 4, "moe_adapt_window": 2},
    "top_k": {"moe_scorer": "mlp", "moe_bias_update_rate": 0.1},
    "top_p": {
        "moe_null_experts": 1,
        "moe_shared_experts": 2,
        "moe_shared_combine": "softmax",
        "moe_expert_size_factor": 2,
        "moe_expert_gated": True,
    },
    "relu": {
        "moe_shared_experts": 1,
        "moe_shared_combine": "mix",
        "moe_layers": "0,3",
        "moe_weight_scale": "learned",
    },
}
GATES = [name for name in gate_names() if name != "cautious"]  # a user's, from the documentation
# The routing of these depends on the update; that of the others does not.
AT_UPDATES = pytest.mark.parametrize(
    "options, updates",
    [
        *((gate, 0) for gate in GATES),
        ("dense_to_sparse", 60),
        ("stable", 60),
        ("switch", 30),
        ("relu", 60),
    ],
    indirect=["options"],
)


@pytest.fixture(params=GATES)
def options(request):
    return {"moe_gate": request.param, **GIVEN.get(request.param, {})}


def tokens(rows=3, length=12):
    return torch.randint(4, 40, (rows, length))


def with_distinct_scores(model):
    """Fresh scores are so close that no change of a token would change a choice."""
    with torch.no_grad():
        for layer in model.decoder.moe_layers:
            for parameter in layer.gate.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
    return model


@AT_UPDATES
def test_evaluation_is_causal(make_model, options, updates):
    model = with_distinct_scores(make_model(**options)).eval()
    model.set_num_updates(updates)
    x = tokens()
    y = model(x)[0]
    for t in (1, 5, 11):
        changed = x.clone()
        changed[:, t] = (changed[:, t] - 3) % 36 + 4
        z = model(changed)[0]
        assert torch.allclose(z[:, :t], y[:, :t], atol=1e-5)
        assert not torch.allclose(z[:, t:], y[:, t:], atol=1e-5)


def test_evaluation_depends_on_no_other_sequence_and_no_padding(make_model, options):
    model = with_distinct_scores(make_model(**options)).eval()
    x = tokens(4)
    whole = model(x)[0]
    for i in range(4):
        assert torch.allclose(model(x[i : i + 1])[0][0], whole[i], atol=1e-5)
    padded = torch.nn.functional.pad(x, (0, 5), value=PAD)
    assert torch.allclose(model(padded)[0][:, :12], whole, atol=1e-5)


@AT_UPDATES
def test_incremental_decoding_equals_full(make_model, options, updates):
    model = with_distinct_scores(make_model(**options)).eval()
    model.set_num_updates(updates)
    x = tokens()
    full = model(x)[0]
    state = {}
    for t in range(x.size(1)):
        step = model.decoder(x[:, : t + 1], incremental_state=state)[0]
        assert torch.allclose(step[:, 0], full[:, t], atol=1e-5)


@AT_UPDATES
def test_activation_checkpointing_changes_nothing(make_model, options, updates):
    plain = with_distinct_scores(make_model(**options, dropout=0.1))
    checkpointed = make_model(**options, dropout=0.1, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = tokens()
    x[0, -3:] = PAD
    results = []
    for model in (plain, checkpointed):
        model.train().set_num_updates(updates)
        torch.manual_seed(3)
        y, extra = model(x)
        loss = y.logsumexp(-1).sum() + sum(aux.sum() for aux in extra["moe_aux"].values())
        loss.backward()
        model.finish_update(updates + 1)
        results.append(
            (
                loss,
                extra["moe_stats"],
                [p.grad for p in model.parameters()],
                dict(model.named_buffers()),
            )
        )
    (loss, stats, grads, state), (other_loss, other_stats, other_grads, other_state) = results
    assert torch.equal(loss, other_loss)
    for name in stats:
        assert torch.equal(stats[name].nan_to_num(), other_stats[name].nan_to_num()), name
    for a, b in zip(grads, other_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_checkpointed_layers_inside_fsdp_change_nothing(make_model, one_rank, options):
    x = tokens()
    results = []
    for wrapped in (False, True):
        torch.manual_seed(2)
        if wrapped:
            with enable_wrap(wrapper_cls=FullyShardedDataParallel):
                model = make_model(**options, checkpoint_activations=True)
            model = FullyShardedDataParallel(model)
        else:
            model = make_model(**options)
        y, extra = model(x)
        loss = y.logsumexp(-1).sum() + sum(aux.sum() for aux in extra["moe_aux"].values())
        loss.backward()
        model.finish_update(1)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        results.append(
            (
                loss,
                norm,
                extra["moe_stats"],
                [dict(layer.gate.named_buffers()) for layer in model.decoder.moe_layers],
            )
        )
    torch.testing.assert_close(*results, equal_nan=True)


def test_the_counted_parameters_are_those_of_the_model(make_model, make_config, options):
    sizes = {
        "decoder_layers": 4,
        "decoder_embed_dim": 16,
        "decoder_ffn_embed_dim": 24,
        "decoder_attention_heads": 2,
        "moe_expert_count": "4",
    }
    model = make_model(**{**sizes, **options})
    config = make_config(**{**sizes, **options}, decoder_input_dim=16, decoder_output_dim=16)
    counted = count_parameters(config, vocabulary=40)
    assert counted.total == sum(p.numel() for p in model.parameters())
    layers = model.decoder.moe_layers
    stacks = [part for layer in layers for part in (layer.experts, layer.shared) if part]
    assert counted.experts == sum(p.numel() for stack in stacks for p in stack.parameters())
    idle = sum(
        p.numel() * (layer.num_experts - 1) // layer.num_experts
        for layer in layers
        for p in layer.experts.parameters()
    )
    assert counted.active_top1 == counted.total - idle
