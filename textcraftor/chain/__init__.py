"""The differentiable denoising chain."""
