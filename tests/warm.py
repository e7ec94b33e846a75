"""Done once when imported by the server of `rank_server`, instead of in each of its forks: reading
the options of a command, and passing over what is imported in collections of garbage."""

import gc

from tests.tiny_runs import MODEL, TRAINING
from tests.torture.forked import configuration, remember_parsing

remember_parsing()
configuration("train", ["data", *MODEL, *TRAINING])
gc.collect()
gc.freeze()
