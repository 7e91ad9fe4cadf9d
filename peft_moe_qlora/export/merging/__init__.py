"""Merged checkpoints, and how true they are."""
