"""HyperDreamBooth and its peers, each in a file of its own, as values of one protocol (protocol.py)."""
