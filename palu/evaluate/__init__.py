"""Measuring models, stock or compressed."""
