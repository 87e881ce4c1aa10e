"""LLM agents as plain coroutines over a `ChatEngine`. They know nothing of Ray, batching or resume."""
