"""Small compressed models whose caches drop tokens."""

import palu
from palu.token_sparsity import METHOD_SETTINGS, TokenSparsity
from tests.helpers import compressed

METHODS = list(METHOD_SETTINGS)
SMALL = {"window_size": 4}


def sparse(method, **settings):
    return TokenSparsity(method, **(SMALL | settings))


def compressed_with(model, sparsity, **options):
    latent = compressed(model, **options).model
    palu.set_token_sparsity(latent, sparsity)
    return latent


def positions_of(cache, layer, group=0):
    """Positions that one token group holds, a list per row."""
    held = cache.layers[layer].position_buffer.tokens[..., group]
    return [[int(p) for p in row if p >= 0] for row in held]
