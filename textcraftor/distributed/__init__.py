"""Several processes: data parallel training, a sharded UNet (FSDP), and division of independent work."""
