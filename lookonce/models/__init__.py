"""Model families and what serves them: checkpoints, devices, linear layers, kernels. May import torch."""
