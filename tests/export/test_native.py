"""Native formats: classes of transformers that compute what our models do, or a refusal."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.import_hf import import_hf
from evomoe_plugin.export.folder import export
from evomoe_plugin.export.native import NATIVE
from evomoe_plugin.generation.generate import generate
from evomoe_plugin.generation.loading import TrainedModel, load_trained_model
from evomoe_plugin.generation.options import GenerationOptions
from evomoe_plugin.generation.text import TextCodec
from tests.evolve.dense_models import dictionary_of
from tests.export.decoders import LLAMA, PHI, tokens
from tests.models.hf_models import DENSE, MOE, VOCABULARY, make_hf

EVERY_LAYER = {**LLAMA, "moe_layers": "0,1,2", "moe_gate": "top_k"}
RENORMALIZED = {"moe_gate": "top_k", "moe_top_k_weights": "renormalized"}
DENSE_PHASE = {"moe_gate": "top_any", "moe_spawn_updates": 10, "moe_layers": "0,1,2"}
GPT2 = {
    "decoder_learned_pos": True,
    "no_scale_embedding": True,
    "moe_spawn_updates": 10,
    "activation_fn": "gelu_accurate",
}
NARROW = {"decoder_input_dim": 16, "decoder_output_dim": 16}
QWEN2_MOE = {
    **LLAMA,
    **RENORMALIZED,
    "decoder_qkv_bias": True,
    "moe_shared_experts": 1,
    "moe_shared_ffn_dim": 20,
    "moe_shared_combine": "sigmoid",
}


@pytest.fixture
def loaded(tmp_path, transformers):
    """Export a model and load it strictly, without code of ours."""

    def load(trained, **given):
        done = export(trained, str(tmp_path / "exported"), **given)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            done.path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values()), report
        assert type(model).__module__.startswith("transformers.models.")
        assert not list(done.path.glob("*.py"))
        return done, model.eval()

    return load


CASES = [
    ("mixtral", {**EVERY_LAYER, **RENORMALIZED, "moe_top_k": 3}, 0),
    ("mixtral", {**EVERY_LAYER, "moe_gate": "gshard"}, 0),
    ("olmoe", {**EVERY_LAYER, "decoder_qk_norm": "joint"}, 0),
    ("olmoe", {**EVERY_LAYER, "decoder_qk_norm": "joint", "moe_gate": "switch"}, 0),
    ("qwen3_moe", {**EVERY_LAYER, "decoder_qk_norm": "shared", "decoder_head_dim": 12}, 0),
    ("qwen3_moe", {**LLAMA, **RENORMALIZED, "decoder_qk_norm": "shared"}, 0),
    (
        "qwen3_moe",
        {**LLAMA, "decoder_qk_norm": "shared", "moe_gate": "dense_to_sparse", "moe_layers": "1"},
        60,
    ),
    (
        "qwen3_moe",
        {
            **LLAMA,
            "decoder_qk_norm": "shared",
            "moe_gate": "dense_to_sparse",
            "moe_combine_weights": "softmax",
            "moe_hard_top_k": 2,
        },
        60,
    ),
    ("qwen2_moe", QWEN2_MOE, 0),
    ("llama", {**LLAMA, **DENSE_PHASE}, 5),
    ("llama", {"arch": "causal_lm", "moe_layers": "none", "activation_fn": "gelu_fast"}, 0),
    ("qwen2", {**LLAMA, **DENSE_PHASE, "decoder_qkv_bias": True}, 5),
    (
        "phi",
        {
            **PHI,
            **DENSE_PHASE,
            "decoder_kv_heads": 2,
            "activation_fn": "gelu_accurate",
        },
        5,
    ),
    ("gpt2", {**GPT2, "moe_gate": "top_k"}, 5),
    ("gpt2", {**GPT2, "moe_gate": "top_k", "share_decoder_input_output_embed": True}, 5),
]


@pytest.mark.parametrize(
    "kind, given, updates", CASES, ids=[f"{n} {kind}" for n, (kind, *_) in enumerate(CASES)]
)
@torch.no_grad()
def test_the_class_computes_the_same(make_trained, loaded, kind, given, updates):
    has_experts = kind in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
    trained = make_trained(updates, **given, **({"moe_aux": "balance=0.02"} if has_experts else {}))
    done, model = loaded(trained)
    assert (done.format, done.why, model.config.model_type) == (kind, None, kind)
    wanted = trained.model(tokens())[0]
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=0, atol=1e-5)
    if has_experts:
        assert model.config.router_aux_loss_coef == 0.02
    assert model.generation_config.eos_token_id == 2 and model.config.pad_token_id == 1


@pytest.mark.parametrize("format", ["auto", "evomoe"])
@torch.no_grad()
def test_rows_without_text_keep_their_logits_and_are_never_generated(
    make_trained, tmp_path, transformers, format
):
    """Padding words and `<unk>`, the most probable everywhere: a model of transformers may have
    more rows than its tokenizer has ids."""
    dictionary = dictionary_of(44)
    for row in range(40, 44):
        dictionary.symbols[row] = f"madeupword{row:04}"
    dictionary.indices = {word: row for row, word in enumerate(dictionary.symbols)}
    trained = make_trained(arch="causal_lm", moe_layers="none", dictionary=dictionary)
    (tmp_path / "padded").mkdir()
    dictionary.save(str(tmp_path / "padded/dict.txt"))
    codec = TextCodec(tmp_path / "padded", dictionary)
    trained = dataclasses.replace(trained, codec=codec, folder=tmp_path / "padded")
    without = [0, 1, 3, 40, 41, 42, 43]
    prompts = tokens()[:, 1:].tolist()
    rows = trained.model.decoder.output_projection.weight
    for prompt in prompts:
        best = trained.model(torch.tensor([[2, *prompt]]))[0][0, -1].topk(7).indices
        rows[without] = 5 * rows[best]
    folder = tmp_path / "exported"
    export(trained, str(folder), format=format)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=format == "evomoe"
    ).eval()
    x = torch.tensor([[2, *prompt] for prompt in prompts])
    wanted = trained.model(x)[0]
    torch.testing.assert_close(model(x).logits, wanted, rtol=0, atol=1e-5)
    assert set(without) & set(wanted.argmax(-1).flatten().tolist())
    assert model.generation_config.suppress_tokens == without
    ours = generate(trained, prompts, GenerationOptions(max_new_tokens=12)).continuations
    for prompt, found in zip(prompts, ours, strict=True):
        ids = torch.tensor([[2, *prompt]])
        theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.size(1) :].tolist()
        assert [token for token in theirs if token != 2] == found.new
        assert not set(found.new) & set(without)


MISFITS = [
    (EVERY_LAYER, "mixtral has no --moe-top-k-weights raw"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_lexical": "normal:1"}, "--moe-lexical normal:1"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_null_experts": 1}, "--moe-null-experts 1"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_weight_scale": "unit"}, "--moe-weight-scale unit"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_gate_centre": 0.9}, "--moe-gate-centre 0.9"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_scorer": "sigmoid"}, "--moe-scorer sigmoid"),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_scorer": "cosine"}, "--moe-scorer cosine"),
    ({**EVERY_LAYER, "moe_gate": "top_p"}, "--moe-gate top_p"),
    (
        {**EVERY_LAYER, "moe_gate": "dense_to_sparse"},
        "--moe-gate dense_to_sparse (not hard at this update)",
    ),
    ({**EVERY_LAYER, **RENORMALIZED, "moe_expert_count": "5,3,5"}, "--moe-expert-count 5,3,5"),
    ({**LLAMA, **RENORMALIZED}, "mixtral has no --moe-layers 0,2"),
    ({**QWEN2_MOE, "moe_shared_combine": "add"}, "qwen2_moe has no --moe-shared-combine add"),
    ({**QWEN2_MOE, "moe_shared_experts": 2}, "qwen2_moe has no --moe-shared-experts 2"),
    ({"arch": "causal_lm", "moe_layers": "none", "rope_fraction": 0.5}, "no --rope-fraction 0.5"),
    ({**RENORMALIZED}, "gpt2 has no --moe-layers (layers with 5 experts)"),
    (
        {"arch": "transformer_lm", "decoder_normalize_before": True, **NARROW},
        "gpt2 has no --decoder-learned-pos False",
    ),
]


@pytest.mark.parametrize("given, why", MISFITS, ids=[why for _, why in MISFITS])
def test_auto_says_what_no_class_has(make_trained, tmp_path, given, why):
    trained = make_trained(**given)
    done = export(trained, str(tmp_path / "exported"))
    assert done.format == "evomoe" and why in done.why and "\n" not in done.why


@pytest.mark.parametrize(
    "kind, given, why",
    [
        ("mixtral", {**EVERY_LAYER, "moe_gate": "switch"}, "--moe-top-k-weights raw"),
        ("llama", EVERY_LAYER, "--moe-layers 0,1,2"),
        ("mixtral", {"arch": "causal_lm", "moe_layers": "none"}, "--moe-layers none"),
        ("qwen3_moe", {**EVERY_LAYER, **RENORMALIZED}, "--decoder-qk-norm none"),
        ("gpt2", EVERY_LAYER, "--decoder-norm rms"),
        ("llama", {"moe_gate": "top_k"}, "--arch transformer_lm_gpttiny_moe"),
        ("olmo9", {"moe_gate": "top_k"}, f"one of: auto, {', '.join(NATIVE)}, evomoe"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(make_trained, tmp_path, kind, given, why):
    trained = make_trained(**given)
    with pytest.raises(OptionError) as refused:
        export(trained, str(tmp_path / "exported"), format=kind)
    assert why in str(refused.value) and str(refused.value).startswith(f"--format {kind}: ")
    assert not (tmp_path / "exported").exists()


def test_without_transformers(make_trained, tmp_path, monkeypatch):
    trained = make_trained(**{**EVERY_LAYER, **RENORMALIZED})
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    with pytest.raises(OptionError, match=r"mixtral: is made by transformers: pip install"):
        export(trained, str(tmp_path / "exported"), format="mixtral")
    assert not (tmp_path / "exported").exists()
    done = export(trained, str(tmp_path / "exported"))
    assert done.format == "evomoe" and "pip install" in done.why


def test_a_bias_of_balancing_is_refused_only_if_there_is_one(make_trained, tmp_path):
    given = {**EVERY_LAYER, **RENORMALIZED, "moe_bias_update_rate": 0.1}
    trained = make_trained(**given)
    assert export(trained, str(tmp_path / "one")).format == "mixtral"
    trained.model.decoder.moe_layers[1].gate.bias_C.copy_(torch.tensor([0, 0, 1.0, 0, 0]))
    assert "--moe-bias-update-rate 0.1" in export(trained, str(tmp_path / "other")).why


def stored(folder):
    """Tensors by name, as they are in the files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", [*DENSE, *MOE])
@torch.no_grad()
def test_import_and_export_give_the_same_bytes(name, tmp_path):
    """Hugging Face folder, our checkpoint, folder, checkpoint."""
    model = make_hf(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "data").mkdir()
    dictionary_of(VOCABULARY).save(str(tmp_path / "data/dict.txt"))
    checkpoint = tmp_path / "model.pt"
    torch.save(first := import_hf("DIR", str(tmp_path / "hf")), checkpoint)
    trained = load_trained_model("CKPT", str(checkpoint), str(tmp_path / "data"))
    kind = model.config.model_type
    done = export(trained, str(tmp_path / "out"), format=kind, max_shard_size="20KB")
    before, after = stored(tmp_path / "hf"), stored(done.path)
    assert before.keys() == after.keys()
    for tensor_name, value in before.items():
        assert torch.equal(value, after[tensor_name]), tensor_name
        assert value.dtype == after[tensor_name].dtype == torch.bfloat16
    assert len(list(done.path.glob("model-*.safetensors"))) > 1
    again = import_hf("DIR", str(done.path))
    assert again["model"].keys() == first["model"].keys()
    for tensor_name, value in first["model"].items():
        assert torch.equal(value, again["model"][tensor_name])
        assert value.dtype == again["model"][tensor_name].dtype
    assert again["cfg"]["model"] == first["cfg"]["model"]
    # Without a name, a class that computes the same, if not the one that it came from.
    assert export(trained, str(tmp_path / "auto")).format in ("llama", kind)


@torch.no_grad()
def test_a_gpt2_comes_back_with_the_same_bytes(tmp_path, transformers):
    """With a dictionary of the model's own token ids."""
    from evomoe_plugin.checkpoint.huggingface import import_gpt2
    from evomoe_plugin.data.dictionary import TokenizerDictionary
    from evomoe_plugin.data.huggingface_tokenizer import SpecialToken
    from tests.evolve.dense_models import build

    config = transformers.GPT2Config(
        vocab_size=37, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=0
    )
    torch.manual_seed(5)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "hf")
    ids = {"bos": (0, "0"), "eos": (0, "0"), "unk": (37, "<unk>"), "pad": (38, "<pad>")}
    dictionary = TokenizerDictionary({name: SpecialToken(*token) for name, token in ids.items()})
    for entry in [*map(str, range(37)), "<unk>", "<pad>", "madeupword0000"]:
        dictionary.add_symbol(entry)
    first = import_gpt2(str(tmp_path / "hf"), dictionary).state
    (tmp_path / "data").mkdir()
    dictionary.save(str(tmp_path / "data/dict.txt"))
    model = build(first, dictionary)

    folder = tmp_path / "data"
    cfg = type("Cfg", (), {"model": model.decoder.args, "task": None})
    trained = TrainedModel(model, cfg, dictionary, TextCodec(folder, dictionary), folder)
    done = export(trained, str(tmp_path / "out"))
    assert done.format == "gpt2"
    again = import_gpt2(str(done.path), dictionary).state
    assert again["model"].keys() == first["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, again["model"][name]), name
    ours, x = transformers.AutoModelForCausalLM.from_pretrained(done.path).eval(), tokens()
    x = x.clamp(max=36)
    torch.testing.assert_close(ours(x).logits[..., :37], theirs(x).logits, rtol=0, atol=1e-5)


def test_shards_have_at_most_the_size_and_an_index(make_trained, tmp_path):
    trained = make_trained(**EVERY_LAYER, moe_top_k_weights="renormalized")
    done = export(trained, str(tmp_path / "exported"), max_shard_size="12KB")
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in done.path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    tensors = stored(done.path)
    assert tensors.keys() == index["weight_map"].keys()
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        within = [sizes[name] for name, where in index["weight_map"].items() if where == file]
        assert sum(within) <= 12_000 or len(within) == 1
    for bad in ("5 apples", "0", "-1GB"):
        with pytest.raises(OptionError, match="--max-shard-size .*: give a size, such as 5GB"):
            export(trained, str(tmp_path / "bad"), max_shard_size=bad)
