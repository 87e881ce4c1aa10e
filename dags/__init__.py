"""The workflows: each module holds a configuration and wires stages, and reads like the figure of its method."""
