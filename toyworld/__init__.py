"""Makes everything that the repository ships: scenes, tokenizers, pre-trained tiny bases, demo photos."""
