"""Recipe and parents -> tensors: in a live model (`live_model`) or in a folder (`checkpoint_writer`).

`routing` builds models from other models' layers; `vocabulary` aligns parents whose tokenizers differ.
"""
