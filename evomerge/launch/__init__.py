"""The composition root: configuration -> opened models, space, tasks, stages, pool, study."""
