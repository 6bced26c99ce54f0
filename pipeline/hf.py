"""`import pipeline.hf` registers exported folders with transformers. See inference/transformers_quantizer.py."""

from pipeline.inference.transformers_quantizer import ExportError, PrefixQuantConfig, PrefixQuantizer

__all__ = ["ExportError", "PrefixQuantConfig", "PrefixQuantizer"]
