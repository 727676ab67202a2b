"""For whoever measures: the paper's experiment, systems, scores, tables and figures; and speed (bench.py)."""
