"""What leaves a study, and recipe files merged by hand: folders that others can use without evomerge.

- `candidate`: a stored candidate as a folder: mergekit's recipe, ours, lineage, model card, and the weights
if asked
- `recipe_file`: a mergekit YAML or an exported recipe.json, merged to a folder
- `lineage`, `model_card`: where a candidate comes from, for programs and for people; `front_matter` for the
  Hub, `card_scores` with intervals, `licenses` and `source_models` by the cards of the models merged
- `commands`, `citation`: what is done with an exported folder, and what it is cited by
- `open_route`: a route of layers made live; `route_checkpoint` writes it as a plain Hugging Face folder,
  `route_mergekit` as a mergekit YAML, and `reload_check` compares what was written in a process of its own

Modules are imported by their path: most load torch.
"""
