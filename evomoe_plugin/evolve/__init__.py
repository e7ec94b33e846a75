"""Change a model during training: its experts, and the optimizer state with them.

Importing registers the callbacks: checks before a checkpoint is loaded, experts from a dense model
at the start of a run, spawn and adaptation after updates, where the options ask for them.
"""

from evomoe_plugin.evolve.adapt import adapt_experts
from evomoe_plugin.evolve.resume_checks import check_spawn, check_trained
from evomoe_plugin.evolve.spawn import spawn_experts
from evomoe_plugin.evolve.start import init_from_dense
from evomoe_plugin.trainer.hooks import after_update, at_train_start, before_loading

before_loading(check_spawn)
before_loading(check_trained)
at_train_start(init_from_dense)
after_update(spawn_experts)
after_update(adapt_experts)
