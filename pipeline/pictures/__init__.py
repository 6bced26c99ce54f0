"""Pictures of a run: its activations, measured (stage `activation_plots`) and drawn, and the report (stage `report`).

Read `activations.py`, then `report.py`. `params.py` is tested in tests/test_params.py.
May import from: runtime to evaluation.
"""
