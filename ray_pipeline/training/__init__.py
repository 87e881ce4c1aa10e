"""Training a policy: TRL trainers inside Ray Train workers, resumable, with one whole model at the end."""
