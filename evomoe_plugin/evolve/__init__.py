"""Changes of a model while it is trained: its experts, and the optimizer's state with them.

Importing has experts made from a dense model at the start of a run, and spawned and adapted after
updates, where the options ask for it; those that wait for the spawn left out of the steps before
it; and checkpoints looked at before a run goes on from them.
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
