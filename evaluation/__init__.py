"""For measuring: the paper's experiment, systems, scores, tables and figures; and speed (bench.py)."""
