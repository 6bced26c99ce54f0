"""Models as this project stores them: families as data, checkpoint folders read and written tensor by tensor.

Read `architectures.py`, then `checkpoint.py`. May import from: runtime to kernels.
"""
