"""Models as they are stored: families as data, checkpoint folders read and written tensor by tensor, importing.

Read `architectures.py`, then `checkpoint.py`; `importing.py` is what the stage `model` calls. May import from: runtime,
numerics.
"""
