"""The paper's experiment: the systems it compares, what is said of a picture, and the tables and plots of
that; and timing, which bench.py measures speed with."""
