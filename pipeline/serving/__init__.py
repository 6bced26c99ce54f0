"""vLLM serves the exported folder as it is, once this project is installed beside vLLM.

Read first: plugin.py, what vLLM calls; then model.py, which puts the exported blocks into vLLM's own model classes.
linear.py and attention.py do without vLLM. May import from every room before it.
"""
