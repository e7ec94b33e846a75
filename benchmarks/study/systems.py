"""The table of systems: what the study trains.

The recipe under test is `RECIPE`; `LEVERS` are its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

EXPERTS, FFN_DIM = 8, 256


@dataclass(frozen=True)
class System:
    """A routing system with its options."""

    name: str
    config: str
    """A configuration of hydra_configs/small."""
    family: str
    """Systems of a family share a peak learning rate, chosen on the family's representative."""
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    importance: int = 3
    """Its first seed is trained in this rank of the queue, each further seed one rank later."""
    equal_flops: bool = False
    """Each token goes to experts that together have the dense FFN's size, during the whole run."""
    share: float = 1.0
    """Length of the run relative to the study's updates."""
    ablates: str | None = None
    """The part of the recipe under test that is left out."""


# The recipe under test, a configuration of hydra_configs/small.
RECIPE = "lexical"
# Part of the recipe -> the overrides that leave it out, given after the recipe's own.
LEVERS: dict[str, tuple[str, ...]] = {
    "lexical": ("model.moe_lexical=none",),
    "fine_grain": (
        "model.moe_expert_count=8",
        "model.moe_expert_size_factor=1",
        "model.moe_top_k=1",
        "model.moe_weight_total=1",
    ),
    "weight_scale": ("model.moe_weight_scale=none", "model.moe_weight_total=1"),
    "balance": ("model.moe_bias_update_rate=0",),
}

ONE_EXPERT = ("model.moe_expert_count=1", "model.moe_gate=dense")
# Schedules that the small configurations count in updates are scaled to 2,000 updates.
_SPAWN = "model.moe_spawn_updates=200"  # the first 10 %
_ADAPTATION = ("model.moe_adapt_record_interval=400", "model.moe_adapt_window=130")

BASELINES = (
    # name, config, family, overrides
    System("dense", "dense_moe", "dense", ONE_EXPERT, 3, 0, True),
    System("switch", "switch", "learned", (), 3, 0, True),
    System("hash", "hash", "table", (), 3, 0, True),
    System("base_layers", "base_layers", "learned", (), 3, 1, True),
    System("top_k2", "plain_moe", "learned", (), 3, 1),
    System("dts", "evomoe_dts", "soft", (), 3, 1),
    System("dts_balanced", "evomoe_dts_balanced", "soft", (), 3, 1),
    System("evomoe", "evomoe", "soft", (_SPAWN,), 3, 1),
    System(
        "dense_wide",  # one FFN of the experts' total width
        "dense_moe",
        "dense",
        (*ONE_EXPERT, f"model.moe_expert_ffn_dim={EXPERTS * FFN_DIM}"),
        3,
        1,
    ),
    System("hash_random", "hash", "table", ("model.moe_hash=random",), equal_flops=True),
    System("stablemoe", "stablemoe", "table", (), equal_flops=True),
    System("gshard", "gshard", "learned"),
    System("remoe", "remoe", "learned"),
    System("deepseek_style", "deepseek_style", "learned"),
    System("dselect_k", "dselect_k", "learned"),
    System("dynmoe", "dynmoe", "learned", _ADAPTATION),
    System("dcmoe", "dcmoe", "learned"),
    System("dense2moe", "dense2moe", "learned"),
    System("dense_moe", "dense_moe", "soft"),
)


def recipe_systems() -> tuple[System, ...]:
    """The recipe under test: as it is, at half the updates, and with each part left out."""

    def system(name: str, left_out: tuple[str, ...] = (), **more) -> System:
        return System(name, RECIPE, "lexical", left_out, equal_flops=True, **more)

    return (
        system("lexical", seeds=3, importance=0),
        system("lexical_half", seeds=3, importance=0, share=0.5),
        System("lexical_annealed", "lexical_annealed", "lexical", (), 3, 1),
        *(
            system(f"lexical_without_{part}", left_out, seeds=3, importance=2, ablates=part)
            for part, left_out in LEVERS.items()
        ),
    )


@dataclass(frozen=True)
class Study:
    """What is trained, for how long, and with which candidates for the learning rate."""

    systems: tuple[System, ...]
    texts: tuple[str, ...]
    grid: tuple[float, ...]
    """Ascending peak learning rates; neighbours differ by a factor of 2."""
    grid_text: str
    """The learning rates are chosen on its validation part, and used for all texts."""
    representatives: dict[str, str]
    """Family -> the system that its learning rate is chosen on."""
    updates: int
    warmup: int
    log_interval: int
    evaluate_interval: int
    save_interval: int
    """A multiple of `evaluate_interval`: fairseq evaluates whenever it saves."""
    overrides: tuple[str, ...]
    """For all systems."""
    name: str = ""
    """Of its folders and report; empty: the study of the routing systems."""
    title: str = "Which routing system?"
    expected: tuple[tuple[str, str], ...] = ()
    """Pairs of systems, the first of which is to end below the second; empty: the criteria of the
    recipe."""
    margin: float = 0.0
    """By which share of its perplexity."""

    def system(self, name: str) -> System:
        return next(system for system in self.systems if system.name == name)


STUDY = Study(
    systems=(*recipe_systems(), *BASELINES),
    texts=("prose", "code"),
    grid=(8e-3, 1.6e-2, 3.2e-2),
    grid_text="prose",
    representatives={
        "dense": "dense",
        "learned": "switch",
        "table": "hash",
        "soft": "dts",
        "lexical": "lexical",
    },
    updates=2000,
    warmup=100,
    log_interval=50,
    evaluate_interval=200,
    save_interval=400,
    overrides=(
        "model.decoder_embed_dim=64",
        f"model.decoder_ffn_embed_dim={FFN_DIM}",
        "dataset.batch_size=16",
        "task.tokens_per_sample=128",
        "model.dropout=0",
        "model.attention_dropout=0",
    ),
)

# The harness in seconds: two systems, four updates, a small text.
SMOKE = Study(
    systems=tuple(replace(s, seeds=1) for s in BASELINES if s.name in ("dense", "switch")),
    texts=("tiny",),
    grid=(2e-3,),
    grid_text="tiny",
    representatives={"dense": "dense", "learned": "switch"},
    updates=4,
    warmup=1,
    log_interval=1,
    evaluate_interval=2,
    save_interval=2,
    overrides=(
        "model.decoder_embed_dim=16",
        "model.decoder_ffn_embed_dim=32",
        "dataset.batch_size=8",
        "task.tokens_per_sample=32",
    ),
)
