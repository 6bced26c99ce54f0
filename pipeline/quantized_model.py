"""`pipeline.quantized_model.load(FOLDER)` checks and loads an exported model with tokenizer. See inference/loading.py."""

from pipeline.inference.loading import Arithmetic, ExportError, load

__all__ = ["Arithmetic", "ExportError", "load"]
