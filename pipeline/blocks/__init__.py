"""One decoder block at work: with quantizers, with a cache that begins with the prefix, run over all windows.

Read `walk.py` first, the central idea of the library, then `quantized.py`. `prefix_kv.py` is tested with the walk,
in `tests/blocks/test_walk.py`. May import from: runtime to text.
"""
