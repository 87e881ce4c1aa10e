"""Storage of a run: schemas, keys, sharded tables, the files of the call log. Independent of the packages above."""
