"""The parts of scripts/soak: each runs in pieces that a later call goes on with."""
