"""The prefix: find the tokens that draw massive activations, choose a prefix among them, or train embeddings instead.

Read `search.py` (stage `prefix_search`), then `training.py` (stage `prefix_training`). Later stages read the result
with `candidates.py`. `params.py` is tested in tests/test_params.py.
May import from: runtime to training.
"""
