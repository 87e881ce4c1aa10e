"""Judges against human labels, and win rates: items and judgements in, a report out."""
