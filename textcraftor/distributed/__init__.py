"""Several processes: data parallel training, FSDP, and division of work."""
