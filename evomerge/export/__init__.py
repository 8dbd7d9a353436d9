"""What leaves a study: a candidate's recipe, card, lineage and checkpoint; recipe files merged to a folder."""
