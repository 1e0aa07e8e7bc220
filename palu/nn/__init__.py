"""Modules of a compressed model: low-rank projections, the latent cache, the one attention forward."""
