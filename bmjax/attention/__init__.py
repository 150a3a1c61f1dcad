"""Attention: one file is one variant, and the folder is the registry.

A file holds one public Flax module, `(x [b, h, w, c], *, train=False) -> [b, h, w, c]`, whose fields are its options.
It sows its map: `self.sow("intermediates", "map", m)`, m [b, h, w] over places or [b, c] over channels, 0..1. A field
`dtype`, where it has one, gets the compute type. Adding a file is all it takes: the contract tests find it.

One that only weighs channels, by what their means over places tell, may say `commutes_with_pooling = True`: pooled, its
result is then its result for pooled features, and training on cached features, which pools them first, is many times
faster.
"""

from bmjax.attention._placing import Chain, IdentityGate, commutes_with_pooling
from bmjax.attention._registry import create_attention, list_attention, sown_maps

__all__ = [
    "Chain",
    "IdentityGate",
    "commutes_with_pooling",
    "create_attention",
    "list_attention",
    "sown_maps",
]
