"""`import pipeline.hf` makes transformers load exported folders. See inference/transformers_quantizer.py."""

from pipeline.inference.transformers_quantizer import ExportError, PrefixQuantConfig, PrefixQuantizer

__all__ = ["ExportError", "PrefixQuantConfig", "PrefixQuantizer"]
