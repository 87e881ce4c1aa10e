"""The workflows: each module wires stages and reads like the figure of its method."""
