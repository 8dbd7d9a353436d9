"""The parts of scripts/validation/soak.py: each runs in pieces that a later call goes on with."""
