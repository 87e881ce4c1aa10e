"""A workflow as one value: its configuration, the stages that it wires, and what can be done with its runs."""
