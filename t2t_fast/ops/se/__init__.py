"""Squeeze-and-excitation: the gate over tokens, and an MLP with such a gate behind it."""

from .op import se_gate, se_mlp

__all__ = ["se_gate", "se_mlp"]
