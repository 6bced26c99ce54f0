"""A model that runs with its prefix: put together from a checkpoint, or loaded from an exported folder.

Read `prefixed_model.py` first, then `transformers_quantizer.py`, through which transformers loads an exported folder.
`loading.py` is the call that users make. May import from: runtime to prefix.
"""
