"""Thin adapters, one per tool: DVC, Great Expectations, MLflow. The library never imports them."""
