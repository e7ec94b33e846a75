"""MoE language models whose sparsity is learned, as a plugin of stock fairseq.

`--user-dir evomoe_plugin` imports this package. Importing patches the faults of the installed
fairseq and fairscale (`patches`) and registers the models, criterions, tasks and optimizers, once.
"""

__version__ = "0.1.0"

# What kept fairseq from being imported, or None. Under `--user-dir` fairseq is what imports us,
# so this can only be set for `evomoe doctor`, whose job is to explain it.
fairseq_error: Exception | None = None

try:
    import fairseq  # noqa: F401
except Exception as error:  # an unsuited fairseq fails in many ways
    fairseq_error = error
else:
    from evomoe_plugin import patches

    patches.apply_all()

    from evomoe_plugin.config.dataclass_fields import add_checkpoint_fields
    from evomoe_plugin.launch import call_main

    add_checkpoint_fields()
    call_main.install()

    from evomoe_plugin import criterions, evolve, models, optim, tasks  # noqa: F401
