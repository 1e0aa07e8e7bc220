"""What a token policy is."""

from dataclasses import dataclass

from torch import Tensor

from palu.token_sparsity import TokenSparsity


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens of a layer's cache are kept, and how many; one file a policy, `score` and `budget`.

    needs_votes: whether scores go by the attention that the newest queries pay to every token.
    decodes: whether tokens are dropped while decoding too, not at prefill only.
    """

    settings: TokenSparsity
    needs_votes = True
    decodes = False

    def score(self, votes: Tensor | None, places: Tensor) -> Tensor:
        """What every token is worth, [batch, length]; the highest are kept.

        Args:
            votes: attention that the newest queries pay to the tokens, float32 [batch, length], zero at the newest
                `window_size` tokens, which are kept in any case; None if not needed.
            places: every token's place among its row's, from 0, int64 [batch, length].
        """
        raise NotImplementedError

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """Tokens that a layer keeps of a row of `length` seen tokens, where those exceed the capacity."""
        raise NotImplementedError

    def kept(self, layer: int, num_layers: int, length: int) -> int:
        """The same of any number of tokens: up to the capacity no layer drops any."""
        if length <= self.settings.capacity_of(length):
            return length
        return min(length, self.budget(layer, num_layers, length))
