"""vLLM serves the exported folder: `vllm serve artifacts/export`, once this project is installed beside vLLM.

Read first: plugin.py, what vLLM calls; then model.py, which puts the exported blocks into vLLM's own model classes. Only
plugin.py, quantization.py, placeholders.py and model.py import vLLM. May import from every room before it.
"""
