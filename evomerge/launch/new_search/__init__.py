"""A new search file: what the user wants and what the models' headers say -> commented YAML.

- `wishes`: what is asked for, from flags, answers or another tool's file
- `mergekit_evolve`, `mergekit_recipe`: a file of mergekit's -> wishes, and what cannot be carried over
- `survey`: the models side by side: kinds, sizes, licenses, the base, how far apart they lie
- `proposal`: wishes and survey -> method, groups, bounds, items
- `draft`: a search file with its comments, as text
- `job_files`: the job of a cluster that runs it
- `write`: all of this, and the files
"""
