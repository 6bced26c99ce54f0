"""vLLM serves the exported folder unchanged, once this project is installed next to vLLM.

Read plugin.py first, which vLLM calls, then model.py, which puts the exported blocks into vLLM's own model classes.
linear.py and attention.py do not need vLLM and are tested in test_parts.py, product.py in test_product.py, the other
modules in test_vllm.py and test_server.py. May import from: runtime to pictures.
"""
