"""Base pipelines: loading them, and what of them is tuned."""
