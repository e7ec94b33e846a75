"""EvoMoE's other two tasks, in miniature: one seed, few systems, short runs (README.md)."""

from __future__ import annotations

from study.systems import ONE_EXPERT, Study, System

UPDATES = 600
# The first is to end below the second.
EXPECTED = (
    ("switch", "dense"),
    ("dts", "dense"),
    ("evomoe", "dts"),
    ("lexical", "switch"),
    ("lexical", "dts"),
)


def _systems(task: str, experts: int) -> tuple[System, ...]:
    """The compared systems.

    Args:
        task: the first part of the names of its configurations.
        experts: of an MoE layer in them.
    """

    def system(name: str, config: str, *overrides: str, equal_flops: bool = False) -> System:
        return System(name, f"{task}_{config}", name, overrides, equal_flops=equal_flops)

    recipe = ("gate=lexical", f"model.moe_expert_count={4 * experts}")
    return (
        system("dense", "dense_moe", *ONE_EXPERT, equal_flops=True),
        system("switch", "switch", equal_flops=True),
        system("lexical", "dense_moe", *recipe, equal_flops=True),
        system("dts", "dts"),
        system("evomoe", "evomoe", f"model.moe_spawn_updates={UPDATES // 10}"),
    )


def _study(name: str, title: str, task: str, text: str, experts: int, *overrides: str) -> Study:
    systems = _systems(task, experts)
    return Study(
        name=name,
        title=title,
        systems=systems,
        texts=(text,),
        grid=(2e-3,),
        grid_text=text,
        representatives={system.family: system.name for system in systems},
        updates=UPDATES,
        warmup=60,
        log_interval=50,
        evaluate_interval=200,
        save_interval=200,
        expected=EXPECTED,
        margin=0.01,
        overrides=(
            "model.encoder_embed_dim=64",
            "model.encoder_ffn_embed_dim=256",
            "model.dropout=0",
            "model.attention_dropout=0",
            *overrides,
        ),
    )


MASKED_LM = _study(
    "masked-lm",
    "Masked language models with experts, in miniature",
    "roberta",
    "prose",
    8,
    "dataset.batch_size=16",
    "task.tokens_per_sample=128",
)
TRANSLATION = _study(
    "translation",
    "Translation with experts, in miniature",
    "wmt",
    "verses",
    4,
    "model.decoder_embed_dim=64",
    "model.decoder_ffn_embed_dim=256",
    "dataset.max_tokens=2048",
    "task.eval_bleu=true",
    'task.eval_bleu_args=\'{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}\'',
    "task.eval_bleu_remove_bpe=sentencepiece",
)
