"""What a run will need, before it runs: downloads, memory, time."""
