"""Verifiable constraints on responses: IFEval's official checkers, and composed prompts."""
