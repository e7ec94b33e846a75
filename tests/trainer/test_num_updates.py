"""The model knows the number of updates when it is validated, as eval-lm will."""

from fairseq.models import BaseFairseqModel

from evomoe_plugin.trainer.moe_trainer import MoETrainer


def watch(monkeypatch):
    """Pairs (updates of the trainer, updates that the model was told) at each validation step."""
    told, pairs = {}, []
    set_num_updates, valid_step = BaseFairseqModel.set_num_updates, MoETrainer.valid_step

    def tell(self, num_updates):
        told["updates"] = num_updates
        set_num_updates(self, num_updates)

    def step(self, *args, **kwargs):
        pairs.append((self.get_num_updates(), told["updates"]))
        return valid_step(self, *args, **kwargs)

    monkeypatch.setattr(BaseFairseqModel, "set_num_updates", tell)
    monkeypatch.setattr(MoETrainer, "valid_step", step)
    return told, pairs


def test_validation_sees_the_update_of_the_checkpoint(runs, monkeypatch):
    _, pairs = watch(monkeypatch)
    assert runs.train("run", "--validate-interval-updates", "2", validate=True).status == 0
    assert set(pairs) == {(2, 2), (4, 4), (6, 6)}


def test_a_fully_sharded_model_is_told(runs, monkeypatch):
    _, pairs = watch(monkeypatch)
    result = runs.train("run", "--ddp-backend", "fully_sharded", updates=2, validate=True)
    assert result.status == 0 and set(pairs) == {(2, 2)}


def test_a_reset_optimizer_resets_the_model_too(runs, monkeypatch):
    told, _ = watch(monkeypatch)
    first = runs.train("first", updates=3)
    begin_epoch, seen = MoETrainer.begin_epoch, []
    monkeypatch.setattr(
        MoETrainer,
        "begin_epoch",
        lambda self, epoch: (seen.append(told["updates"]), begin_epoch(self, epoch)),
    )
    restore = ("--restore-file", first.folder / "checkpoint_last.pt")
    assert runs.train("resumed", *restore, updates=4).status == 0
    assert runs.train("reset", *restore, "--reset-optimizer", updates=1).status == 0
    assert seen == [3, 0]
