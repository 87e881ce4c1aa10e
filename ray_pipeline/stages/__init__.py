"""The stages of the workflows: tables in, table out."""
