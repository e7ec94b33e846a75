"""The task in Hydra: `data=sft` with any of our files."""

from pathlib import Path

import pytest
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from evomoe_plugin.tasks.language_modeling_sft import LanguageModelingSFTTask

CONFIGS = Path(__file__).parents[2] / "hydra_configs"

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*version_base")


def test_fine_tuning_is_a_choice_of_data(sft_folder):
    hydra_init("small/evomoe_dts")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        cfg = compose(
            "small/evomoe_dts",
            [
                "data=sft",
                f"task.data={sft_folder}",
                r"task.user_template='It\'s {}: '",
                "task.moe_aux_balance_weight=10",
            ],
        )
    assert (cfg.task._name, cfg.model._name) == (
        "language_modeling_sft",
        "transformer_lm_gpttiny_moe",
    )
    task = LanguageModelingSFTTask.setup_task(cfg.task)
    assert task.templates.user == "It's {}: "
    task.load_dataset("train")
    assert set(task.dataset("train").collater([task.dataset("train")[0]])["net_input"]) == {
        "src_tokens",
        "src_lengths",
        "segments",
        "token_weights",
    }
