"""Preference data: prompts, candidates, verdicts, critiques, decisions, dataset rows and files."""
