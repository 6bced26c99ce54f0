"""`pipeline.quantized_model.load(folder)`: an exported model and its tokenizer, checked. See inference/loading.py."""

from pipeline.inference.loading import Arithmetic, ExportError, load

__all__ = ["Arithmetic", "ExportError", "load"]
