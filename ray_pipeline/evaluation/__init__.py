"""Statistics of a run: how far judges agree, what the gate kept, whether the policy got better.

Pure functions over pyarrow tables and numpy arrays: no Ray, no engine, no files (perplexity reads a model).
"""
