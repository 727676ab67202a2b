"""Lets the tests import the modules at the top of the repository and the rule in tests/reference."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "reference")]
