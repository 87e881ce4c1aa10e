"""What a run stores: schemas, keys, sharded tables, the call log's files. Knows nothing of the rooms above."""
