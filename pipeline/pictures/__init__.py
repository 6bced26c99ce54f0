"""What a run looks like: activations measured (stage `activation_plots`) and drawn, and the report (stage `report`).

Read `activations.py`, then `report.py`. May import from: runtime to evaluation.
"""
