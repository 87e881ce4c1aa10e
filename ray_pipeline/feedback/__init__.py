"""The feedback loop: responses, reviews, revisions, and the pick of the best."""
