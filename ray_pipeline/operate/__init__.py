"""What an operator does with a run beside running it: watch, re-gate, plan, retry, export, clean."""
