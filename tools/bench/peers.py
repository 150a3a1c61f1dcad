"""The networks that tools/bench/bench.py compares with: DenseNet in plain Flax and in PyTorch, written as one would at
first, any other network in plain Flax, layer by layer as keras.applications has it, and DenseNets and ResNet50 in ONNX.

All have the architecture and the head of the bmjax network they stand beside: same parameters, same FLOPs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

BLOCKS: dict[str, tuple[int, ...]] = {
    "densenet121": (6, 12, 24, 16),
    "densenet169": (6, 12, 32, 32),
    "densenet201": (6, 12, 48, 32),
    "densenet_tiny": (1, 2, 2),  # for dry runs
}
HIDDEN, CLASSES = 256, 7
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours, 0 to 1: keras.applications' mode `torch`."""


def flax_densenet(name: str, dtype: Any = None) -> Any:
    """A Linen module: images [b, h, w, 3], float -> logits [b, 7]; `flax.linen`'s own layers throughout, computing in
    `dtype` (None: the input's)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class DenseNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool, train_backbone: bool = True) -> Any:
            norm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1.001e-5, dtype=dtype)
            by_running = not (train and train_backbone)
            conv = functools.partial(nn.Conv, use_bias=False, dtype=dtype)
            x = conv(64, (7, 7), (2, 2), padding=((3, 3), (3, 3)))(x)
            x = nn.max_pool(nn.relu(norm(by_running)(x)), (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore
            for number, layers in enumerate(BLOCKS[name]):
                for _ in range(layers):
                    y = conv(128, (1, 1))(nn.relu(norm(by_running)(x)))
                    y = conv(32, (3, 3))(nn.relu(norm(by_running)(y)))
                    x = jnp.concatenate([x, y], axis=-1)
                x = nn.relu(norm(by_running)(x))
                if number < 3:
                    x = nn.avg_pool(conv(x.shape[-1] // 2, (1, 1))(x), (2, 2), (2, 2))
            x = x.mean((1, 2))
            if not train_backbone:
                x = jax.lax.stop_gradient(x)
            return _flax_head(x, train)

    return DenseNet()


def flax_from_keras(base: Any, dtype: Any = None) -> Any:
    """The Linen module of a functional Keras model without top, each layer as `flax.linen` has it, with the same head.

    Images [b, h, w, 3] as `base` takes them -> logits [b, 7]; computes in `dtype` (None: the input's).
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    def apply(layer: Any, inputs: list[Any], by_running: bool) -> Any:
        kind, config, (x, *others) = type(layer).__name__, layer.get_config(), inputs
        if kind == "ZeroPadding2D":
            return jnp.pad(x, ((0, 0), *layer.padding, (0, 0)))
        if kind in ("Conv2D", "DepthwiseConv2D", "SeparableConv2D"):
            settings: dict[str, Any] = {"padding": config["padding"].upper(), "use_bias": False, "dtype": dtype}
            size, strides, c = config["kernel_size"], config["strides"], x.shape[-1]
            if kind == "Conv2D":
                settings["use_bias"] = config["use_bias"]
                return nn.Conv(layer.filters, size, strides, **settings)(x)
            x = nn.Conv(c, size, strides, feature_group_count=c, **settings)(x)
            return x if kind == "DepthwiseConv2D" else nn.Conv(layer.filters, (1, 1), use_bias=False, dtype=dtype)(x)
        if kind == "BatchNormalization":
            return nn.BatchNorm(by_running, momentum=layer.momentum, epsilon=layer.epsilon, dtype=dtype)(x)
        if kind in ("Activation", "ReLU"):
            names = {"relu": nn.relu, "swish": nn.silu, "silu": nn.silu, "sigmoid": nn.sigmoid}
            return nn.relu6(x) if getattr(layer, "max_value", None) else names[config.get("activation", "relu")](x)
        if kind == "MaxPooling2D":
            return nn.max_pool(x, layer.pool_size, layer.strides, layer.padding.upper())
        if kind == "GlobalAveragePooling2D":
            return x.mean((1, 2))
        if kind == "Reshape":
            return x.reshape(-1, *layer.target_shape)
        if kind in ("Add", "Multiply"):
            (y,) = others
            return x + y if kind == "Add" else x * y
        if kind in ("Rescaling", "Normalization", "Dropout"):  # preprocessing is the caller's
            return x
        raise ValueError(f"no plain Flax for Keras's {kind} ({layer.name})")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool, train_backbone: bool = True) -> Any:
            values = {id(base.inputs[0]): x}
            for layer in base.layers[1:]:
                inputs = layer.input if isinstance(layer.input, list) else [layer.input]
                values[id(layer.output)] = apply(layer, [values[id(i)] for i in inputs], not (train and train_backbone))
            x = values[id(base.outputs[0])].mean((1, 2))
            if not train_backbone:
                x = jax.lax.stop_gradient(x)
            return _flax_head(x, train)

    return Network()


def _flax_head(x: Any, train: bool) -> Any:
    """Within a module's compact method: features [b, c] -> logits [b, 7]."""
    import flax.linen as nn

    x = nn.BatchNorm(not train, name="head_norm")(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(CLASSES, name="logits")(nn.relu(nn.Dense(HIDDEN, name="dense")(x)))


def torch_densenet(name: str) -> tuple[Any, Any]:
    """(backbone, head) as torch modules in channels-last memory: images [b, 3, h, w] -> features -> logits [b, 7]."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    class Layer(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 128, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)

        def forward(self, x: Any) -> Any:
            y = self.conv1(torch.relu_(self.norm1(x)))
            return torch.cat([x, self.conv2(torch.relu_(self.norm2(y)))], 1)

    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for number, count in enumerate(BLOCKS[name]):
        for _ in range(count):
            layers.append(Layer(channels))
            channels += 32
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if number < 3:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(
        nn.BatchNorm1d(channels), nn.Dropout(0.5), nn.Linear(channels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )
    return backbone.to(memory_format=torch.channels_last), head  # pyright: ignore[reportCallIssue]


class _Onnx:
    """An ONNX graph that grows layer by layer, as an exporter of PyTorch writes it: channels first, random weights."""

    def __init__(self) -> None:
        import onnx.helper
        import onnx.numpy_helper

        self._helper, self._from_array = onnx.helper, onnx.numpy_helper.from_array
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._rng = np.random.default_rng(0)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The name of the output of a new node."""
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weight(self, values: Any) -> str:
        name = f"weight_{len(self._weights)}"
        self._weights.append(self._from_array(np.asarray(values, np.float32), name))
        return name

    def conv(self, x: str, channels: int, filters: int, size: int, stride: int = 1) -> str:
        scale = (channels * size * size) ** -0.5
        kernel = self.weight(scale * self._rng.standard_normal((filters, channels, size, size)))
        pads = [(size - 1) // 2] * 4
        return self.add("Conv", x, kernel, kernel_shape=[size, size], strides=[stride, stride], pads=pads)

    def norm(self, x: str, channels: int) -> str:
        ones, zeros = self.weight(np.ones(channels)), self.weight(np.zeros(channels))
        return self.add("BatchNormalization", x, ones, zeros, zeros, ones, epsilon=1.001e-5)

    def norm_relu(self, x: str, channels: int) -> str:
        return self.add("Relu", self.norm(x, channels))

    def max_pool(self, x: str) -> str:
        return self.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def dense(self, x: str, channels: int, units: int) -> str:
        kernel = self.weight(channels**-0.5 * self._rng.standard_normal((channels, units)))
        return self.add("Gemm", x, kernel, self.weight(np.zeros(units)))

    def start(self) -> str:
        """Images uint8 [b, h, w, 3], scaled."""
        x = self.add("Cast", "images", to=1)
        mean, deviation = self.weight(255 * np.array(MEAN)), self.weight(255 * np.array(DEVIATION))
        x = self.add("Div", self.add("Sub", x, mean), deviation)
        return self.add("Transpose", x, perm=[0, 3, 1, 2])

    def serialized(self, x: str, channels: int, size: int) -> bytes:
        """The model whose last feature maps are `x`, with the head that the others have."""
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        x = self.add("Relu", self.dense(self.norm(x, channels), channels, HIDDEN))
        x = self.dense(x, HIDDEN, CLASSES)
        make = self._helper.make_tensor_value_info
        given, found = make("images", 2, ["b", size, size, 3]), make(x, 1, ["b", CLASSES])
        graph = self._helper.make_graph(self._nodes, "peer", [given], [found], self._weights)
        opset = self._helper.make_opsetid("", 17)
        return self._helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def onnx_network(name: str, size: int) -> bytes:
    """The ONNX model of a DenseNet or of ResNet50: images uint8 [b, size, size, 3] -> logits [b, 7], in eval mode."""
    graph = _Onnx()
    x = graph.conv(graph.start(), 3, 64, 7, 2)
    x, channels = graph.max_pool(graph.norm_relu(x, 64)), 64
    if name == "resnet50":
        for number, count in enumerate((3, 4, 6, 3)):
            width = 64 << number
            for layer in range(count):
                stride = 2 if number and not layer else 1
                short = x if layer else graph.norm(graph.conv(x, channels, 4 * width, 1, stride), 4 * width)
                y = graph.norm_relu(graph.conv(x, channels, width, 1, stride), width)
                y = graph.norm_relu(graph.conv(y, width, width, 3), width)
                y = graph.norm(graph.conv(y, width, 4 * width, 1), 4 * width)
                x, channels = graph.add("Relu", graph.add("Add", short, y)), 4 * width
        return graph.serialized(x, channels, size)
    for number, count in enumerate(BLOCKS[name]):
        for _ in range(count):
            y = graph.norm_relu(graph.conv(graph.norm_relu(x, channels), channels, 128, 1), 128)
            x, channels = graph.add("Concat", x, graph.conv(y, 128, 32, 3), axis=1), channels + 32
        x = graph.norm_relu(x, channels)
        if number < 3:
            x, channels = graph.conv(x, channels, channels // 2, 1), channels // 2
            x = graph.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    return graph.serialized(x, channels, size)
