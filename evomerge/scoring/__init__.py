"""Scoring a live transformers model fast and exactly: log-likelihoods and greedy generation from token ids.

What a model can be trusted with (sharing prefixes, forking caches, token trees, slots) is decided by numbers, not by a list
of names. Knows nothing of lm-eval, tasks or merging: token ids in, numbers and token ids out.
"""
