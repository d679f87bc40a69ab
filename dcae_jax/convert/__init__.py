"""Weights in and out of PyTorch's layouts: names, configs, releases, reading, writing, checking."""
