"""`pipeline.quantized_model.load(folder)`: an exported model and its tokenizer, checked. See export/loading.py."""

from pipeline.export.loading import Arithmetic, ExportError, load

__all__ = ["Arithmetic", "ExportError", "load"]
