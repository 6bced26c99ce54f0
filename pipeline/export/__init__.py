"""The deliverable: packed weights, scales and prefix in one folder, and what loads it.

Read `folder.py` first, what the stage `export` calls, then `transformers_quantizer.py` and `prefixed_model.py`, which
make it run in transformers. May import from: runtime to prefix.
"""
