"""Models as this project stores them: model families as data, and checkpoint folders with one file per block.

Read `sites.py`, `architectures.py`, then `checkpoint.py`. May import from: runtime to kernels.
"""
