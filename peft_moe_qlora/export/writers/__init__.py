"""Writes adapters in the layouts of others."""
