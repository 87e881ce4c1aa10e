"""MT-Bench: two-turn questions, graded or compared by a judge."""
