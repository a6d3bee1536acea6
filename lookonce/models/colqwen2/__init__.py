"""ColQwen2 and ColQwen2.5 (ColPali, arXiv:2407.01449): a vector for each token, by a head behind a Qwen tower."""
