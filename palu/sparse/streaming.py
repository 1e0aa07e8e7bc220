"""StreamingLLM (arXiv 2309.17453): attention sinks and the newest tokens."""

from torch import Tensor

from palu.sparse.base import TokenPolicy


class Streaming(TokenPolicy):
    """The first few tokens and the newest, at prefill and while decoding."""

    needs_votes = False
    decodes = True

    def score(self, votes: None, places: Tensor) -> Tensor:
        """The newer, the better."""
        return places.float()

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """The capacity."""
        return self.settings.capacity_of(length)
