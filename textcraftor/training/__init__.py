"""Fine-tuning by reward gradients: the loop, its objective, its data and its state."""
