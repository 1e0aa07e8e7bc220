"""Pooled merging after github.com/en-jai-neer/kv-cache-compression: older tokens are merged window by window."""

import math

from torch import Tensor

from palu.sparse.base import TokenPolicy


class Pool(TokenPolicy):
    """Sinks and the newest tokens stay exact; those between are merged, at prefill and while decoding."""

    decodes = True

    def score(self, votes: Tensor, places: Tensor) -> Tensor:
        """Votes as they are: they weigh positions, and the best token of a window is the one with the most."""
        return votes

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """`L_k = L_0 [1 + (k / m) (1 / beta - 1)]` with the capacity as L_0."""
        settings = self.settings
        share = 1 + layer / num_layers * (1 / settings.pyramid_beta - 1)
        # The slack keeps products such as 440 x 41 / 440 from being rounded down past a whole number.
        return max(settings.least, math.floor(settings.capacity_of(length) * share + 1e-9))
