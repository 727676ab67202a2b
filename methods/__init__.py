"""HyperDreamBooth and its peers, one file each, as values of one protocol (protocol.py)."""
