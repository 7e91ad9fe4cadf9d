"""Adapters and models for those who don't have this package."""

from .adapter_file import AdapterFile, ExpertFactors, read_adapter
from .convert import TARGETS, convert_adapter

__all__ = ["TARGETS", "AdapterFile", "ExpertFactors", "convert_adapter", "read_adapter"]
