"""The `quorum` command: one app, files by subject."""

from ray_pipeline.cli.command import app, main

__all__ = ["app", "main"]
