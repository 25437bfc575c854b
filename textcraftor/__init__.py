"""TextCraftor: make text-to-image models better by tuning their text encoder with reward models.

The library and its command line. It imports torch, diffusers, transformers and open_clip, and no
orchestrator: Prefect, DVC, MLflow and Great Expectations conduct it from `flows/` and `tasks/`.

Method: Li et al., "TextCraftor: Your Text Encoder Can be Image Quality Controller", CVPR 2024.
"""

__version__ = "0.1.0"
