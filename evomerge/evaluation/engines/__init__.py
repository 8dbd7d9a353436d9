"""Text engines: other programs' inference, such as vLLM, with a candidate's weights written into them.

- `engine`: the protocol `TextEngine`, and the values that travel. `texts`: greedy texts from an engine, by
  our stop rules.
- `vllm_engine`: vLLM. `weight_positions`: where each tensor of a checkpoint lies in an engine's parameters.
  `vllm_extension`: what runs in vLLM's own worker processes.
- `child_engine`: an engine in a process of its own, which may have another environment; `child_process` is
  that process, `shared_weights` how tensors reach it.
- `live_engine`: an engine that follows a live model: opened once, started again where it died, given what
  changed. `engine_check`: compares its tokens and log-probabilities with the live model's.
- `choice`: whether an engine or our own decoder generates a task's texts, for `backend: auto`.

Nothing is imported here: a process of vLLM's environment imports what it needs, and has neither lm-eval nor
the other packages of evomerge.
"""
