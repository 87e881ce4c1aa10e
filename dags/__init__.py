"""The workflows: each module has a configuration and wires stages, and reads like the figure of its method."""
