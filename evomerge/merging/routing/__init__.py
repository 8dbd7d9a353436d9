"""Data-flow merges: a model whose layers are other models' layers, taken by reference, perhaps scaled.

* `routed_model`: the module that takes one route after another.
* `checks`: whether a model's layers can be routed and scaled, decided by numbers.
* `decoder_layers`: the decoder stack of a live model, and what its layers are called with.
* `layer_config`, `layer_source`, `file_config`, `computed_lists`: what configs say of each layer, along a
  route.
* `fingerprint`: the structure of modules, compared and digested.
* `scale_folding`, `scale_tracing`: a scale of the hidden state put into the weights of the layers.
* `plain_checkpoint`: whether a route is a model that transformers can load.
"""
