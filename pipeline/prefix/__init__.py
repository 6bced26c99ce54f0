"""The prefix: which tokens draw massive activations, which of them stand in front, embeddings trained in their place.

Read `search.py` (stage `prefix_search`), then `training.py` (stage `prefix_training`); `candidates.py` is what later
stages read. May import from: runtime to training.
"""
