"""Changes of a model while it is trained: its experts, and the optimizer's state with them.

Importing has experts made from a dense model at the start of a run, and spawned and adapted after
updates, where the options ask for it.
"""

from evomoe_plugin.compat.train_start import at_train_start
from evomoe_plugin.compat.update_end import after_update
from evomoe_plugin.evolve.adapt import adapt_experts
from evomoe_plugin.evolve.spawn import spawn_experts
from evomoe_plugin.evolve.start import init_from_dense

at_train_start(init_from_dense)
after_update(spawn_experts)
after_update(adapt_experts)
