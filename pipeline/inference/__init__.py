"""A model that runs with its prefix: assembled from a checkpoint, or loaded from an exported folder.

Read `prefixed_model.py` first, then `transformers_quantizer.py`, through which transformers loads an exported folder.
Users call `loading.py`. Calls that share a model or a cache are tested in `tests/inference/test_caches.py`, dtypes in
`test_dtypes.py`, sliding windows in `test_sliding.py`, and transformers' other entry points in
`test_in_transformers.py`. `generation.py` is tested in `test_prefixed_model.py`, `packed_block.py` in
`tests/export/test_folder.py`. May import from: runtime to prefix.
"""
