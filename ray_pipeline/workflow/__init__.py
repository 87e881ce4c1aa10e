"""A workflow as one value: its configuration, the stages that it wires, and the operations on its runs."""
