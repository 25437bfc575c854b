"""The prefix cache: latents at the switch and rewards' text features, stored in shards."""
