"""The ways to place variants: `Chain`, one after another, and `IdentityGate`, from the identity on."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.layers import at_least_float32, over_channels


def commutes_with_pooling(module: nn.Module) -> bool:
    """Whether a variant says that its result's mean over places is its result for the mean over places."""
    return getattr(module, "commutes_with_pooling", False)


class Chain(nn.Module):
    """Variants one after another, each with its parameters and its map under its name."""

    variants: tuple[tuple[str, nn.Module], ...]

    @property
    def commutes_with_pooling(self) -> bool:
        return all(commutes_with_pooling(module) for _, module in self.variants)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, c]."""
        for name, module in self.variants:
            x = module.clone(parent=self, name=name)(x, train=train)
        return x


class IdentityGate(nn.Module):
    """x + gamma * (y - x), gamma [c] from zero: attention y = f(x) begins as the identity, with a gradient to gamma.

    As in ReZero (Bachlechner et al. 2020, https://arxiv.org/abs/2003.04887), with a factor for each channel as in
    LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239). The first update moves gamma alone: f's own
    gradient is gamma times what it would be.
    """

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Two of [b, h, w, c] -> [b, h, w, c]."""
        gamma = self.param("gamma", nn.initializers.zeros_init(), x.shape[-1:], jnp.float32)
        # In bfloat16 the sum that is gamma's gradient would lose most of its digits.
        wide = at_least_float32(x.dtype)
        change = over_channels(gamma.astype(wide), x.ndim) * (y.astype(wide) - x.astype(wide))
        return (x.astype(wide) + change).astype(x.dtype)
