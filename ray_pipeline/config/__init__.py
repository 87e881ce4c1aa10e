"""The YAML file of a run: blocks shared by all workflows, loading with overrides, and error messages."""
