"""How good a model is: perplexity, divergence from the original, tasks of lm-eval.

Read `perplexity.py` first, what the stage `evaluation` calls. May import from: runtime to export.
"""
