"""FLOPs are those of the mathematics, whichever code of a platform computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bmjax
from bmjax.analysis.cost import flops_of, step_flops
from bmjax.config import Config, DataConfig, ModelConfig, StageConfig, TrainConfig
from bmjax.layers import Conv, prepare
from bmjax.training.stages import plan_stages


@pytest.mark.parametrize(("size", "channels", "features"), [(1, 1664, 64), (3, 128, 32)])
def test_a_convolution_counts_whole_where_a_kernel_computes_it(size, channels, features):
    prepare()
    x = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    conv = Conv(features, size, padding=size // 2, use_bias=False)
    variables = jax.eval_shape(lambda x: conv.init(jax.random.key(0), x), x)
    places = sum(min(8, i + 2) - max(0, i - 1) for i in range(8)) ** 2 if size == 3 else 64
    assert flops_of(conv.apply, variables, x) == 2 * places * channels * features


def test_a_dense_network_and_its_step_count_whole():
    prepare()
    model = ModelConfig(backbone="densenet_tiny", weights=None, attention="none")
    config = Config(data=DataConfig(image_size=64), model=model, stages=(StageConfig(epochs=1),),
                    train=TrainConfig(batch_size=4))  # fmt: skip
    network = bmjax.create(model, 7)
    variables = jax.eval_shape(lambda: bmjax.init(network, jax.random.key(0), 64))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    forward = flops_of(lambda v, x: network.apply(v, x, train=False), variables, image)
    plan = plan_stages(config, 3, network, variables["batch_stats"])[0]
    # A step is a forward and about two more, for the gradients of inputs and of kernels, for each of four images.
    assert 2.2 < step_flops(config, network, plan, variables) / (4 * forward) < 3.6
