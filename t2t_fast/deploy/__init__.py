"""Models for use: frozen for inference, replayed as CUDA graphs, exported to other runtimes."""
