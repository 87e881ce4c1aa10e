"""Public benchmarks: MT-Bench, AlpacaEval 2 and IFEval; each has its questions, its judge and its score."""
