"""Engines of chat models behind one protocol (``base``): vLLM in process, endpoints, and the call log before them."""
