"""Decode attention on Hopper GPUs in one launch: scores and values side by side."""
