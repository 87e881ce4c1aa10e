"""Verifiable constraints on responses: IFEval's official checkers, composed prompts, and overlap with a benchmark."""
