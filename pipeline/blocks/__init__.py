"""One decoder block at work: with quantizers, with a cache that begins with the prefix, walked through by all windows.

Read `walk.py` first, the central idea of the library, then `quantized.py`. May import from: runtime to text.
"""
