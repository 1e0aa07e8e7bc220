"""SnapKV (arXiv 2404.14469): what the newest queries attend to."""

from torch import Tensor
from torch.nn import functional as F

from palu.sparse.base import TokenPolicy


class SnapKV(TokenPolicy):
    """Tokens that the observation window votes for, together with their neighbours; every layer keeps as many."""

    def score(self, votes: Tensor, places: Tensor) -> Tensor:
        """Votes averaged over neighbours (equation 5: pooling keeps what surrounds an important token)."""
        size = self.settings.kernel_size
        return F.avg_pool1d(votes[:, None], size, stride=1, padding=size // 2)[:, 0]

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """The capacity."""
        return self.settings.capacity_of(length)
