"""The systems that the paper compares with, each in a file of its own: only its difference from hdb.py."""
