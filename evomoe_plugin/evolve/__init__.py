"""Changes of a model while it is trained: its experts, and the optimizer's state with them.

Importing has experts adapted after updates, where the gate and the options ask for it.
"""

from evomoe_plugin.compat.update_end import after_update
from evomoe_plugin.evolve.adapt import adapt_experts

after_update(adapt_experts)
