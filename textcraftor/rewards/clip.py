"""The CLIP constraint: how well an image fits its prompt."""

from textcraftor.rewards.openclip import OpenClipReward


class Clip(OpenClipReward):
    """Cosine of each image with its own prompt under any open_clip model, without logit scale.

    Every mix needs it with a weight above 0, or a single reward collapses the model (paper section 3.2.2 and figure 6).
    The paper uses "ViT-g-14:laion2b_s34b_b88k"; SD 1.5 scores .24 to .30.
    """
