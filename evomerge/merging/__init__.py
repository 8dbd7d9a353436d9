"""Recipe and parents -> tensors, in a live model or in a folder of files.

* `merge`, `tensor_plan`, `merged_config`: a recipe checked, planned from headers, and merged tensor by
  tensor.
* `merged_parent`, `parent_placement`: parents that are merges themselves, or that are kept on the device.
* `memory_plan`, `layer_split`, `host_memory`: what lies on which card, from sizes alone. `parent_loading`,
  `arena`: files -> memory. `layer_devices`: a model over several cards.
* `weight_map`: where a tensor on disk lands in a live transformers model.
* `live_model`: recipe -> module, over models that are loaded once; what a worker scores.
* `checkpoint_writer`, `companion_files`, `atomic_folder`: recipe -> Hugging Face folder, whole or not at all.
  `written_tokenizer`, `older_config_keys`: what transformers 4 reads of it.
* `model_loading`, `mergekit_check`: folders loaded by transformers, and merges compared with mergekit's.
* `routing`: models built of other models' layers. `vocabulary`: parents whose tokenizers differ.
"""
