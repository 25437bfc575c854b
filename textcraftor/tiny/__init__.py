"""The embedded default: a small world of rendered scenes, and all that is needed to tune a real, small model in it."""
