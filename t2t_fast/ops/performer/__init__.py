"""The Performer: its attention, the token layer around it, and a soft split with such a layer behind."""

from .op import performer_attention, soft_split_performer, token_performer

__all__ = ["performer_attention", "soft_split_performer", "token_performer"]
