"""The composition root: configuration -> opened models, space, tasks, stages, pool and study.

- `prepare`: a search request -> a study ready to run, by `opening` (models and tasks), `facts` (what must not
  change), `stages` with an opener for each kind (`weight_stages`, `route_stages`), and `pool`
- `new_search`: a search file to begin with, from wishes and the models' headers
- `dry_run`: what a search would be; `memory`: what lies on which card
- `environment`: whether this machine can run a search
- `rescoring`: stored candidates compared and scanned with their models open; `derivatives`: by gradient
- `api`, `search_request`, `study_view`, `ask_tell`: what `import evomerge` offers
- `weight_space`, `route_stacks`, `relaxed_routes`, `route_screen`, `objective`, `tasks`, `threads`: what
  these are made of

Modules are imported by their path: those that open models load torch, `search_request`, `study_view` and
`api` do not.
"""
