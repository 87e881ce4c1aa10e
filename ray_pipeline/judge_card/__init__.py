"""Judge cards: a judge on public sets and on built-in probes, before a run pays for it."""
