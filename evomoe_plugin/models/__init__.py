"""GPT language models with MoE layers: model, decoder, decoder layer, architectures."""

from evomoe_plugin.models import architectures  # noqa: F401
