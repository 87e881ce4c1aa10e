"""The last stage of a run: its numbers, its headline and its page."""
