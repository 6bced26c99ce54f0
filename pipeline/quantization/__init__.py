"""Choosing every scale and rounding the weights, block by block, before any training.

Read `quantizer_init.py` first, what the stage of that name calls: one block records (`statistics.py`), is equalized
(`equalization.py`), searched (`scale_search.py`) and rounded (`block_init.py`). May import from: runtime to rotation.
"""
