"""Create what the repository contains: scenes, tokenizers, pre-trained tiny bases and the images of the demos."""
