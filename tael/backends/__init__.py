"""Implementations of a model: one meaning, several machines."""
