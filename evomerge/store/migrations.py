"""The tables of a study's file, as the scripts that bring an older file up to date, oldest first.

Rows carry a digest, see `evomerge.store.integrity`; indexes of digests let SQLite's own check see a page of
an earlier time, which is whole in itself. An attempt may come before its recipe is stored. Table `ends`: a
budget that ended an island of a stage, so that a replay ends there too; `runs`: of drivers, with the time
that each has driven. The text of a script is never changed, which is why long lines are continued by a
backslash: the check of a file compares it with what the file holds.
"""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE study (
        id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, seed INTEGER NOT NULL, config TEXT NOT \
NULL,
        overrides TEXT NOT NULL, facts TEXT NOT NULL, state TEXT NOT NULL, outcome TEXT, created REAL NOT \
NULL, finished REAL);
    CREATE TABLE recipes (id TEXT PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE item_sets (id TEXT PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY, recipe TEXT NOT NULL REFERENCES recipes, role TEXT NOT NULL,
        item_set TEXT NOT NULL REFERENCES item_sets, score REAL, error TEXT, metrics TEXT NOT NULL, scores \
TEXT NOT NULL,
        seconds TEXT NOT NULL, created REAL NOT NULL, UNIQUE (recipe, role, item_set));
    CREATE TABLE trials (
        id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, slot INTEGER NOT NULL, origin TEXT NOT NULL, \
label TEXT,
        genome TEXT, parents TEXT NOT NULL, recipe TEXT NOT NULL REFERENCES recipes,
        evaluation INTEGER NOT NULL REFERENCES evaluations, UNIQUE (generation, slot));
    CREATE INDEX trials_by_recipe ON trials (recipe);
    """,
    """
    CREATE TABLE sensitivity (
        id INTEGER PRIMARY KEY, centre TEXT NOT NULL REFERENCES recipes, axis TEXT NOT NULL, value REAL NOT \
NULL,
        recipe TEXT NOT NULL REFERENCES recipes, role TEXT NOT NULL, item_set TEXT NOT NULL REFERENCES \
item_sets, score REAL, error TEXT,
        metrics TEXT NOT NULL, scores TEXT NOT NULL, seconds TEXT NOT NULL, created REAL NOT NULL, UNIQUE \
(centre, axis, value, role, item_set));
    """,
    """
    ALTER TABLE evaluations ADD COLUMN reported REAL;
    ALTER TABLE evaluations ADD COLUMN probabilities TEXT;
    ALTER TABLE evaluations ADD COLUMN logprobs TEXT;
    ALTER TABLE trials ADD COLUMN dropped INTEGER;
    ALTER TABLE trials ADD COLUMN violation REAL;
    CREATE TABLE front (evaluation INTEGER PRIMARY KEY REFERENCES evaluations, point TEXT NOT NULL);
    """,
    "ALTER TABLE trials ADD COLUMN whole INTEGER",
    """
    ALTER TABLE trials ADD COLUMN stage INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE evaluations ADD COLUMN costs TEXT;
    """,
    """
    ALTER TABLE trials ADD COLUMN island INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE trials ADD COLUMN digest TEXT;
    ALTER TABLE study ADD COLUMN digest TEXT;
    ALTER TABLE evaluations ADD COLUMN digest TEXT;
    ALTER TABLE sensitivity ADD COLUMN digest TEXT;
    ALTER TABLE front ADD COLUMN digest TEXT;
    CREATE TABLE attempts (
        id INTEGER PRIMARY KEY, recipe TEXT NOT NULL, number INTEGER NOT NULL, cause TEXT NOT NULL, error \
TEXT, worker TEXT NOT NULL,
        host TEXT NOT NULL, pid INTEGER NOT NULL, device TEXT NOT NULL, started REAL NOT NULL, seconds REAL \
NOT NULL, log TEXT NOT NULL, digest TEXT);
    CREATE TABLE ends (
        id INTEGER PRIMARY KEY, stage INTEGER NOT NULL, island INTEGER NOT NULL, generation INTEGER NOT \
NULL, cause TEXT NOT NULL, digest TEXT,
        UNIQUE (stage, island));
    CREATE INDEX front_by_digest ON front (digest);
    CREATE INDEX attempts_by_digest ON attempts (digest);
    CREATE TABLE runs (id INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT \
NULL, seconds REAL NOT NULL, digest TEXT);
    """,
    "ALTER TABLE evaluations ADD COLUMN slopes TEXT",
    "ALTER TABLE evaluations ADD COLUMN answers TEXT",
)
READABLE_FROM = 6
"""The oldest schema that is read as it is: readers do without what later scripts add."""
