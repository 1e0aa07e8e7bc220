"""Token policies: one file each, and one line here."""

from palu.sparse.base import TokenPolicy
from palu.sparse.pool import Pool
from palu.sparse.pyramidkv import PyramidKV
from palu.sparse.snapkv import SnapKV
from palu.sparse.streaming import Streaming
from palu.token_sparsity import TokenSparsity

POLICIES: dict[str, type[TokenPolicy]] = {
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "streaming": Streaming,
    "pool": Pool,
}


def get_policy(settings: TokenSparsity) -> TokenPolicy:
    """The policy that the settings name."""
    return POLICIES[settings.method](settings)
