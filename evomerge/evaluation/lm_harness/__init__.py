"""lm-eval tasks as a set of tasks that score live models. The only package that imports lm_eval.

- `harness`: `LmHarness`, the task set. `backends`: what answers the requests, a registry by name.
- `task_catalogue`, `task_loading`, `items`, `prompts`, `groups`: from a task's name to items, roles and
  requests.
- `results`, `samples`, `truncation`: from responses to values, samples and warnings.
- `lm_eval_patches`: the only file that replaces anything of lm-eval's; `sandbox`: what task files may not do.

Nothing is imported here, so that `backends` can be read without loading lm-eval and torch.
"""
