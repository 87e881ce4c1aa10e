"""Statistics of a run: how far judges agree, what the gate kept, whether the policy got better.

Pure functions over pyarrow tables and numpy arrays: no Ray, no engine, no files. The exceptions say so: perplexity
reads a model, benchmark_files reads files, and the public benchmarks have coroutines that ask a judge.
"""
