"""IFEval: verifiable instructions, decided by the official checkers."""
