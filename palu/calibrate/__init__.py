"""Token windows in, statistics out: text and data sets, input moments, Fisher information, their cache on disk."""
