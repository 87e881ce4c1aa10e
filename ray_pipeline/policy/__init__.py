"""The policy: its training stage, its responses, and how they compare with the base model's."""
