"""Stages, their fingerprints, and how they run on Ray: a task graph of stages, a Ray Data map of shards inside one."""
