"""Data-flow merges: a model whose layers are other models' layers, taken by reference, perhaps scaled."""
