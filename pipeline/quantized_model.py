"""`pipeline.quantized_model.load(FOLDER)` loads an exported model and its tokenizer. See inference/loading.py."""

from pipeline.inference.loading import Arithmetic, ExportError, load

__all__ = ["Arithmetic", "ExportError", "load"]
