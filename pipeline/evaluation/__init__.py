"""Quality of a model: perplexity, divergence from the original, tasks of lm-eval.

Read `perplexity.py` first, which the stage `evaluation` calls. `texts.py` is tested in tests/test_command_lines.py,
`params.py` in test_task_data.py. May import from: runtime to export.
"""
