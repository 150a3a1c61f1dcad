"""The fast path for CPUs: C++ kernels and formulations that measured fastest. Nothing imports it but `layers.dispatch`.

The folder can be deleted: everything works without it, and gives the same numbers but for rounding.
"""

from bmjax.cpu import build, convolution, dense_block, norm, pool

REPLACEMENTS = {
    f.__name__: f
    for f in (
        build.prepare,
        build.described,
        convolution.fits_loop,
        convolution.convolution,
        convolution.dilated_convolution,
        norm.by_hand,
        norm.moments,
        norm.channel_sums,
        norm.conv_norm,
        norm.normed,
        norm.normed_convolution,
        pool.pool_gradient,
        dense_block.dense_layers,
    )
}
"""By the name of the operation in bmjax/layers that each computes."""
