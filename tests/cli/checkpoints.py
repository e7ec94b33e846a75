"""Checkpoint files for the verbs that read them."""

import dataclasses
import pickle

import torch
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf


def save_checkpoint(trained, path):
    """The model of `trained` as fairseq's trainer writes it, but for the optimizer's state."""
    task = {
        **dataclasses.asdict(LanguageModelingConfig(data=str(trained.folder))),
        "_name": "language_modeling",
        "tokens_per_sample": 64,
        "seed": 1,
        "batch_size": 1,
        "batch_size_valid": 1,
        "dataset_impl": "mmap",
        "data_buffer_size": 10,
        "tpu": False,
        "use_plasma_view": False,
        "plasma_path": "",
        "sample_break_mode": "none",
        "shorten_method": "none",
    }
    model = OmegaConf.to_container(trained.cfg.model, resolve=True)
    cfg = OmegaConf.create(
        {
            "common": {"seed": 1, "user_dir": None},
            "task": task,
            "model": model,
            "criterion": {"_name": "cross_entropy"},
            "optimizer": None,
            "lr_scheduler": None,
            "optimization": {"max_update": 100},
            "dataset": {},
            "checkpoint": {},
            "distributed_training": {"distributed_world_size": 1},
            "bpe": None,
            "tokenizer": None,
        }
    )
    torch.save(
        {
            "cfg": cfg,
            "args": None,
            "model": trained.model.state_dict(),
            "criterion": {},
            "optimizer_history": [
                {
                    "num_updates": 20,
                    "optimizer_name": "FairseqAdam",
                    "criterion_name": "CrossEntropyCriterion",
                    "lr_scheduler_state": {},
                }
            ],
            "task_state": {},
            "extra_state": {"epoch": 1},
            "last_optimizer_state": None,
        },
        path,
    )
    return path


class _Evil:
    def __init__(self, touched):
        self.touched = str(touched)

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.PosixPath(self.touched),)


def malicious(path, touched, is_plain=False):
    """A checkpoint, or a plain pickle, that makes the file `touched` where it is read without
    care."""
    if is_plain:
        path.write_bytes(pickle.dumps(_Evil(touched)))
    else:
        torch.save({"model": {}, "cfg": _Evil(touched)}, path)
    return path
