"""One document model, its renderers, charts and a browser of examples."""
