"""`import pipeline.hf` makes transformers load exported folders. See export/transformers_quantizer.py."""

from pipeline.export.transformers_quantizer import ExportError, PrefixQuantConfig, PrefixQuantizer

__all__ = ["ExportError", "PrefixQuantConfig", "PrefixQuantizer"]
