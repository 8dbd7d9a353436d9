"""A zoo of small models trained from scratch, on which merging pays: skills, training plan, network,
training.
"""
