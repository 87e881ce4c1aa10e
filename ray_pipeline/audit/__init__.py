"""The walk back: every training row to its decision, verdicts, candidate and prompt."""
