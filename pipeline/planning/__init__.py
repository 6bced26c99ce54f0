"""Memory and disk that a stage will need, computed from the model's shapes before it runs (`--plan`).

Read `need.py` first, then the module of a stage. Computes no result, so no stage reruns when a plan changes. May import
from: runtime to evaluation.
"""
