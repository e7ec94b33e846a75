"""Results do not depend on the batch; the cost follows the routed pairs."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import evomoe_plugin
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.generation.generate import generate
from evomoe_plugin.generation.loading import load_trained_model
from evomoe_plugin.generation.options import GenerationOptions
from evomoe_plugin.generation.text import TextCodec
from tests.cli.checkpoints import save_checkpoint
from tests.data import chat_templates
from tests.dispatch.test_expert_parallel import on_ranks
from tests.export.conftest import make_trained, transformers, words  # noqa: F401  fixtures
from tests.gates.test_every_gate import label
from tests.models.conftest import make_config  # noqa: F401  a fixture
from tests.tasks.test_chat_template import write

EOS, PAD, UNK, BOS = 2, 1, 3, 0
GATES = [
    "base",
    "dense",
    "dense_to_sparse",
    "dselect_k",
    "expert_choice",
    "gshard",
    "hash",
    "relu",
    "stable",
    "switch",
    "top_any",
    "top_k",
    "top_p",
]
NEEDED = {"expert_choice": {"moe_allow_noncausal": True}}
STRATEGIES = {
    "greedy": {},
    "beam": {"beam": 3},
    "sampling": {"temperature": 1.3},
    "top-k and top-p": {"top_k": 12, "top_p": 0.8, "temperature": 2.0},
}


def prompts():
    """Nine prompts of different lengths, one of them empty."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(4, 40, (n,), generator=generator).tolist()
        for n in (5, 1, 9, 0, 3, 3, 14, 2, 7)
    ]


def tokens_of(trained, given, **options):
    done = generate(trained, given, GenerationOptions(max_new_tokens=12, **options))
    assert [c.prompt for c in done.continuations] == given
    return [c.new for c in done.continuations]


QUICK = [("dense_to_sparse", "greedy"), ("dense_to_sparse", "sampling"), ("top_any", "greedy")]
LONGER = {
    *((gate, "greedy") for gate in GATES),
    *(("dense_to_sparse", s) for s in STRATEGIES),
    ("top_k", "beam"),
    ("hash", "sampling"),
} - set(QUICK)


@pytest.mark.parametrize(
    "gate, strategy",
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(LONGER))],
)
def test_the_same_tokens_at_any_batch_size(make_trained, gate, strategy):  # noqa: F811
    trained = make_trained(20, moe_gate=gate, **NEEDED.get(gate, {}))
    alone = tokens_of(trained, prompts(), batch_size=1, **STRATEGIES[strategy])
    assert len(set(map(tuple, alone))) > 5
    assert tokens_of(trained, prompts(), batch_size=8, **STRATEGIES[strategy]) == alone


def check_on_ranks(rank, size, folder, wanted, options):
    """A rank, alone or with another, generates what one process does, at the same cost."""
    evomoe_plugin.register()
    trained = load_trained_model("path", f"{folder}/checkpoint.pt", f"{folder}/data", size)
    experts = trained.model.decoder.moe_layers[0].experts
    assert len(experts.fc1_weight) == 4 // size
    held, saved = (
        sum(t.numel() * t.element_size() for name, t in named if ".moe.experts." in name)
        for named in (
            trained.model.named_parameters(),
            torch.load(f"{folder}/checkpoint.pt", weights_only=False)["model"].items(),
        )
    )
    assert held == saved // size > 0
    for one in wanted:
        given = [c.prompt for c in one.continuations]
        done = generate(trained, given, GenerationOptions(max_new_tokens=12, **options))
        assert [(c.prompt, c.new) for c in done.continuations] == [
            (c.prompt, c.new) for c in one.continuations
        ]
        if len(given) == 1:
            assert (done.pairs, done.routed_tokens) == (one.pairs, one.routed_tokens)


@pytest.mark.parametrize(
    "size, strategy",
    [
        pytest.param(2, "sampling", marks=pytest.mark.distributed),
        pytest.param(1, "sampling", marks=pytest.mark.slow),
        pytest.param(2, "greedy", marks=pytest.mark.slow),
        pytest.param(2, "beam", marks=pytest.mark.distributed),
    ],
)
def test_the_same_tokens_on_two_ranks(make_trained, tmp_path, size, strategy):  # noqa: F811
    """Prompts divided over the ranks, and experts too."""
    trained = make_trained(20, moe_gate="top_p", moe_top_p=0.6, moe_expert_count="4")
    save_checkpoint(trained, tmp_path / "checkpoint.pt")
    options = STRATEGIES[strategy]
    wanted = [
        generate(trained, given, GenerationOptions(max_new_tokens=12, **options))
        for given in (prompts(), prompts()[:1])  # 5 and 4; 1 and none
    ]
    on_ranks(2, check_on_ranks, size, str(tmp_path), wanted, {**options, "batch_size": 2})


@torch.no_grad()
def best_next(model, rows):
    """The most probable allowed token, by a forward pass over all tokens."""
    logits = model(torch.tensor([[EOS, *rows]]))[0][0, -1]
    logits[[BOS, PAD, UNK]] = -math.inf
    return int(logits.argmax())


LLAMA = {"arch": "causal_lm_moe", "decoder_kv_heads": 1, "decoder_qk_norm": "shared"}


@pytest.mark.parametrize(
    "given",
    [
        {"moe_gate": "dense_to_sparse"},
        {**LLAMA, "moe_gate": "top_p"},
        *(pytest.param({"moe_gate": gate}, marks=pytest.mark.slow) for gate in ("top_k", "hash")),
    ],
    ids=label,
)
def test_greedy_takes_the_most_probable_token(make_trained, given):  # noqa: F811
    trained = make_trained(20, **given)
    for prompt, new in zip(prompts(), tokens_of(trained, prompts()), strict=True):
        wanted = []
        while len(wanted) < 12 and (token := best_next(trained.model, prompt + wanted)) != EOS:
            wanted.append(token)
        assert new == wanted


@pytest.mark.slow
def test_one_ends_and_others_go_on(make_trained):  # noqa: F811
    trained = make_trained(20)
    with torch.no_grad():
        trained.model.decoder.output_projection.weight[EOS] *= 10
    lengths = {len(new) for new in tokens_of(trained, prompts(), temperature=1.0)}
    assert len(lengths) > 2
    assert tokens_of(trained, prompts(), temperature=1.0, batch_size=1) == tokens_of(
        trained, prompts(), temperature=1.0
    )


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, LLAMA], ids=["gpt", "llama"])
def test_a_wide_beam_finds_what_is_more_probable(make_trained, given):  # noqa: F811
    trained = make_trained(20, **given)

    def scores(beam):
        done = generate(trained, prompts(), GenerationOptions(max_new_tokens=3, beam=beam))
        return [c.score for c in done.continuations]

    done = generate(trained, prompts(), GenerationOptions(max_new_tokens=3, beam=8))
    for found in done.continuations:  # scores are those of a forward pass over all tokens
        tokens = [EOS, *found.prompt, *found.new]
        lprobs = trained.model(torch.tensor([tokens]))[0][0].log_softmax(1)
        targets = [*tokens[1:], EOS]
        scores_T = lprobs[range(len(targets)), targets]
        assert found.score == pytest.approx(scores_T.mean().item(), abs=1e-5)
    pairs = list(zip(scores(1), scores(8), strict=True))
    assert all(wide >= narrow - 1e-5 for narrow, wide in pairs)
    assert any(wide > narrow + 1e-3 for narrow, wide in pairs)


@pytest.mark.slow
def test_sampling_follows_seed_and_probabilities(make_trained):  # noqa: F811
    trained = make_trained(20)
    given = [[7, 8, 9]] * 2000

    def drawn(seed, **options):
        done = generate(
            trained,
            given,
            GenerationOptions(
                max_new_tokens=1, seed=seed, batch_size=500, temperature=1.0, **options
            ),
        )
        return torch.tensor([(c.new or [EOS])[0] for c in done.continuations])

    first = drawn(1)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))
    with torch.no_grad():
        logits = trained.model(torch.tensor([[EOS, 7, 8, 9]]))[0][0, -1]
    logits[[BOS, PAD, UNK]] = -math.inf
    probs = logits.softmax(0)
    counts = first.bincount(minlength=40)
    deviation = (2000 * probs * (1 - probs)).sqrt()
    assert ((counts - 2000 * probs).abs() <= 5 * deviation + 1).all()

    order = probs.argsort(descending=True)
    assert set(drawn(1, top_k=3).tolist()) == set(order[:3].tolist())
    kept = 1 + int((probs[order].cumsum(0) < 0.4).sum())
    assert set(drawn(1, top_p=0.4).tolist()) == set(order[:kept].tolist())
    assert set(drawn(1, top_p=1e-6).tolist()) == {int(order[0])}


def test_the_length_of_the_model_ends_a_text(make_trained):  # noqa: F811
    trained = make_trained(20, decoder_learned_pos=True)
    assert trained.model.max_decoder_positions() == 64
    with torch.no_grad():
        trained.model.decoder.output_projection.weight[EOS] = -trained.model.decoder.layer_norm.bias
    given = [[5] * 60, [6] * 62, [7]]
    done = generate(trained, given, GenerationOptions(max_new_tokens=100))
    assert all(len(c.prompt + c.new) <= 63 for c in done.continuations)
    with pytest.raises(OptionError, match=r"--prompt \(number 2\): has 63 tokens: give at most 62"):
        generate(trained, [[5], [5] * 63], GenerationOptions())


def test_the_cost_of_a_step_follows_the_pairs(make_trained):  # noqa: F811
    """Cached positions are not computed again, except for attention to them."""
    costs = {}
    for gate in ("reached", "top1", "dense"):
        trained = make_trained(
            20,
            moe_gate="dense_to_sparse",
            moe_eval_gate=gate,
            moe_temperature_start=0.6,
            moe_gate_threshold=0.05,
        )
        with FlopCounterMode(display=False) as counter:
            done = generate(trained, [[5, 6, 7]], GenerationOptions(max_new_tokens=10))
        steps = done.routed_tokens / 2
        costs[gate] = counter.get_total_flops(), done.pairs, steps
        assert steps == 3 + len(done.continuations[0].new) + 1
        assert done.experts == 5 * done.routed_tokens
    per_pair, cheap = 2 * 2 * 16 * 24, costs["top1"]
    assert cheap[1] == 2 * cheap[2]
    assert costs["dense"][1] == 10 * costs["dense"][2]
    for flops, pairs, steps in costs.values():
        if steps == cheap[2]:
            assert flops - cheap[0] == (pairs - cheap[1]) * per_pair
    assert sum(steps == cheap[2] for _, _, steps in costs.values()) > 1


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"temperature": 1.0, "seed": 3}])
def test_stops_end_texts_and_prompts_may_contain_them(make_trained, options):  # noqa: F811
    """Whatever the batch; before it stops, a text is that of a search without stops."""
    trained = make_trained(20)
    given = [[*prompt, EOS, 9] for prompt in prompts()]
    starts = [5, *[6] * (len(given) - 1)]

    def tokens(given, starts, stops, **more):
        done = generate(
            trained,
            given,
            GenerationOptions(max_new_tokens=8, **options, **more),
            starts=starts,
            stops=stops,
        )
        return [c.new for c in done.continuations]

    stops = [9, 17, 23, 31]
    together = tokens(given, starts, stops)
    assert tokens(given, starts, stops, batch_size=1) == together
    assert any(len(new) < 8 for new in together) and any(together)
    assert not {9, 17, 23, 31, EOS, BOS, PAD, UNK} & {t for new in together for t in new}
    if "beam" not in options:
        unstopped = tokens(given, starts, [39])
        for new, longer in zip(together, unstopped, strict=True):
            both = min(len(new), len(longer))
            assert longer[:both] == new[:both]
            assert both == len(longer) or longer[both] in stops


@pytest.fixture
def chatting(make_trained, tmp_path):  # noqa: F811
    """A model of a tokenizer whose end of text is in every prompt of its chats."""
    marks = {"eos_token": "<|eot_id|>", "chat_template": chat_templates.HEADERS}
    folder = write(tmp_path / "chat", "llama3", **marks)
    dictionary = load_dictionary("data", folder / "dict.txt")
    trained = make_trained(20, dictionary=dictionary)
    return dataclasses.replace(
        trained, dictionary=dictionary, codec=TextCodec(folder, dictionary), folder=folder
    )


def test_chats_go_on_as_transformers_would(chatting, transformers):  # noqa: F811
    theirs = transformers.AutoTokenizer.from_pretrained(chatting.folder)
    texts = ["The dog?", "The </s> fox"]
    chats = chatting.codec.encode_chat(texts)
    wanted = [
        theirs.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]
    assert [[s, *p] for s, p in zip(chats.starts, chats.prompts, strict=True)] == wanted
    assert chats.stops == [theirs.eos_token_id]
    done = generate(
        chatting,
        chats.prompts,
        GenerationOptions(max_new_tokens=6),
        starts=chats.starts,
        stops=chats.stops,
    )
    for ids, found in zip(wanted, done.continuations, strict=True):
        greedy = []
        with torch.no_grad():
            while len(greedy) < 6:
                logits = chatting.model(torch.tensor([[*ids, *greedy]]))[0][0, -1]
                logits[chatting.codec.without_text()] = -math.inf
                if (token := int(logits.argmax())) == theirs.eos_token_id:
                    break
                greedy.append(token)
        assert found.new == greedy
    assert chatting.codec.decode(wanted[0]) == theirs.decode(wanted[0])


def test_chats_need_a_template(make_trained):  # noqa: F811
    with pytest.raises(OptionError, match="--chat True: no chat template, or the model"):
        make_trained().codec.encode_chat(["a"])


BAD = [
    ({"max_new_tokens": 0}, "--max-new-tokens 0: give 1 or more"),
    ({"beam": 0}, "--beam 0: give 1 or more"),
    ({"beam": 20}, "--beam 20: the dictionary has 40 tokens: give at most 19"),
    ({"beam": 2, "top_p": 0.5}, "--beam 2: beam search does not sample"),
    ({"temperature": 0.0}, "--temperature 0.0: give a number above 0"),
    ({"temperature": math.nan}, "--temperature nan"),
    ({"top_p": 1.5}, "--top-p 1.5: it is a probability"),
    ({"top_k": 0}, "--top-k 0: give 1 or more"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"seed": -1}, "--seed -1"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m for _, m in BAD])
def test_bad_options(make_trained, given, message):  # noqa: F811
    with pytest.raises(OptionError, match=message):
        generate(make_trained(), [[5]], GenerationOptions(**given))


def test_a_prompt_that_ends_a_text(make_trained):  # noqa: F811
    with pytest.raises(OptionError, match=r"--prompt \(number 1\): contains </s>, which ends"):
        generate(make_trained(), [[5, EOS, 6]], GenerationOptions())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beam": 2}])
def test_nan_is_reported(make_trained, options):  # noqa: F811
    trained = make_trained()
    with torch.no_grad():
        trained.model.decoder.layer_norm.bias.fill_(math.nan)
    with pytest.raises(RunFailed, match="the model's output is NaN/Inf"):
        generate(trained, [[5]], GenerationOptions(**options))
