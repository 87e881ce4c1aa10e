"""`python -m ray_pipeline.cli`."""

from ray_pipeline.cli import main

main()
