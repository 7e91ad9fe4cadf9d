"""Reads adapters of this package and of others."""
