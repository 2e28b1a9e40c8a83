"""Other ways to spend less on a ViT, re-implemented from their papers over the same timm model."""
