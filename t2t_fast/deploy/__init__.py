"""Deployment: models frozen for inference, captured as CUDA graphs, exported to other runtimes."""
