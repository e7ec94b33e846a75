"""Options of generation, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from evomoe_plugin.config.errors import OptionError


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt: greedy, unless a beam or sampling options are given."""

    max_new_tokens: int = 64
    beam: int = 1
    temperature: float | None = None
    """Sampling temperature; None: no sampling, or 1 with top_k or top_p."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1
    batch_size: int = 8

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return any(given is not None for given in (self.temperature, self.top_k, self.top_p))

    def validate(self, vocabulary: int) -> None:
        """Raise `OptionError` for invalid values, with a dictionary of this size."""
        from evomoe_plugin.config.values import check_number

        for option in ("max_new_tokens", "beam", "batch_size", "top_k"):
            check_number(self, option, "[1, inf)", "give 1 or more")
        check_number(
            self, "temperature", "(0, inf)", "give a number above 0; omit it for greedy decoding"
        )
        check_number(
            self, "top_p", "(0, 1]", "it is a probability: give a number above 0 and at most 1"
        )
        check_number(self, "seed", f"[0, {2**63})", "give a number from 0")
        if self.beam > 1 and self.samples:
            raise OptionError(
                "beam",
                self.beam,
                "beam search does not sample: omit it, or omit --temperature, --top-k and --top-p",
            )
        if self.beam > max(1, (vocabulary - 1) // 2):
            raise OptionError(
                "beam",
                self.beam,
                f"the dictionary has {vocabulary} tokens: give at most {(vocabulary - 1) // 2}",
            )
