"""``nn.Module``s on top of :mod:`t2t_fast.ops`, with the official parameter names."""

from .attention import Attention
from .block import Block, DenseBlock, Transition
from .ghost import GhostAttention, GhostMlp
from .se import SELayer, SEMlp
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer
from .tokens_to_token import TokensToToken

__all__ = [
    "Attention",
    "Block",
    "DenseBlock",
    "GhostAttention",
    "GhostMlp",
    "SELayer",
    "SEMlp",
    "TokenPerformer",
    "TokenTransformer",
    "TokensToToken",
    "Transition",
]
