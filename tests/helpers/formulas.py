"""Each variant's equations in NumPy, in evaluation: (params, batch_stats, x [b, h, w, c], options) -> (y, map)."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def relu(z):
    return np.maximum(z, 0)


def softmax(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(p, s, x, epsilon=1e-5):
    return (x - s["mean"]) / np.sqrt(s["var"] + epsilon) * p["scale"] + p["bias"]


def conv(p, x, *, stride=1, dilation=1, groups=1):
    """Zeros around, half the kernel's reach on each side; one output pixel after the other."""
    kernel = p["kernel"]
    kh, kw, per_group, n = kernel.shape
    top, left = dilation * (kh - 1) // 2, dilation * (kw - 1) // 2
    padded = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    b, h, w, _ = x.shape
    y = np.zeros((b, -(-h // stride), -(-w // stride), n))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            rows = i * stride + dilation * np.arange(kh)
            columns = j * stride + dilation * np.arange(kw)
            patch = padded[:, rows][:, :, columns]
            for g in range(groups):
                ins = slice(g * per_group, (g + 1) * per_group)
                outs = slice(g * (n // groups), (g + 1) * (n // groups))
                y[:, i, j, outs] = np.tensordot(patch[..., ins], kernel[..., outs], 3)
    return y + p.get("bias", 0)


def over_places(v):
    return v[:, None, None]


def none(p, s, x):
    return x, np.ones(x.shape[:3])


def soft(p, s, x, widths=(64, 16), gated=False):
    z = x
    for i in range(1, len(widths) + 1):
        last = gated and i == len(widths)
        z = np.tanh(conv(p[f"conv{i}"], z)) * sigmoid(conv(p["gate"], z)) if last else relu(conv(p[f"conv{i}"], z))
    z = conv(p["mask"], z)[..., 0]
    if gated:
        a = np.exp(z) / np.exp(z).sum((1, 2), keepdims=True)
        return x * a[..., None] * z[0].size, a
    m = sigmoid(z)
    return x * (m / m.mean((1, 2), keepdims=True))[..., None], m


def se(p, s, x):
    gate = sigmoid(dense(p["expand"], relu(dense(p["reduce"], x.mean((1, 2))))))
    return x * over_places(gate), gate


def ese(p, s, x):
    gate = sigmoid(dense(p["dense"], x.mean((1, 2))))
    return x * over_places(gate), gate


def eca(p, s, x, kernel_size=3):
    z, kernel = x.mean((1, 2)), p["conv"]["kernel"][:, 0, 0, 0]
    assert len(kernel) == kernel_size
    around = np.pad(z, ((0, 0), (kernel_size // 2,) * 2))
    gate = sigmoid(np.stack([around[:, i : i + kernel_size] @ kernel for i in range(z.shape[1])], 1))
    return x * over_places(gate), gate


def cbam(p, s, x):
    def shared(v):
        return dense(p["expand"], relu(dense(p["reduce"], v)))

    x = x * over_places(sigmoid(shared(x.mean((1, 2))) + shared(x.max((1, 2)))))
    z = conv(p["spatial_conv"], np.stack([x.max(-1), x.mean(-1)], -1))
    gate = sigmoid(norm(p["spatial_bn"], s["spatial_bn"], z))
    return x * gate, gate[..., 0]


def bam(p, s, x):
    channels = dense(p["expand"], relu(dense(p["reduce"], x.mean((1, 2)))))
    channels = norm(p["channel_bn"], s["channel_bn"], channels)
    z = relu(conv(p["conv0"], x))
    z = relu(conv(p["conv1"], z, dilation=4))
    z = relu(conv(p["conv2"], z, dilation=4))
    places = norm(p["spatial_bn"], s["spatial_bn"], conv(p["conv3"], z))
    gate = sigmoid(over_places(channels) + places)
    return x * (1 + gate), gate.mean(-1)


def scse(p, s, x, combine="add"):
    channels = x * over_places(se(p, s, x)[1])
    gate = sigmoid((x * p["places"]["kernel"][0, 0, :, 0]).sum(-1))
    places = x * gate[..., None]
    return (channels + places if combine == "add" else np.maximum(channels, places)), gate


def gather_excite(p, s, x, kind="theta-", extent=0):
    b, h, w, c = x.shape
    if extent == 0:
        gate = sigmoid(x.mean((1, 2)))
        return x * over_places(gate), gate
    if kind == "theta-":
        z = np.zeros((b, -(-h // extent), -(-w // extent), c))
        for i in range(z.shape[1]):
            for j in range(z.shape[2]):
                top, left = (max(0, extent * v - extent + 1) for v in (i, j))
                z[:, i, j] = x[:, top : extent * i + extent, left : extent * j + extent].mean((1, 2))
    else:
        z = x
        for i in range(1, round(np.log2(extent)) + 1):
            z = conv(p[f"gather{i}"], relu(z) if i > 1 else z, stride=2, groups=c)
            z = norm(p[f"gather{i}_bn"], s[f"gather{i}_bn"], z)
        if kind == "theta+":
            z = conv(p["expand"], relu(conv(p["reduce"], z)))
    gate = np.stack([[sigmoid(z[:, i // extent, j // extent]) for j in range(w)] for i in range(h)])
    gate = gate.transpose(2, 0, 1, 3)
    return x * gate, gate.mean(-1)


def global_context(p, s, x):
    e = np.exp(x @ p["scores"]["kernel"][0, 0, :, 0])
    a = e / e.sum((1, 2), keepdims=True)
    z = dense(p["reduce"], (a[..., None] * x).sum((1, 2)))
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    z = dense(p["expand"], relu(z * p["norm"]["scale"] + p["norm"]["bias"]))
    return x + over_places(z), a


def style_recalibration(p, s, x):
    z = x.mean((1, 2)) * p["weights"][0] + x.std((1, 2)) * p["weights"][1]
    gate = sigmoid(norm(p["bn"], s["bn"], z))
    return x * over_places(gate), gate


def simam(p, s, x):
    """Equation 5 as it stands: the least energy of each value."""
    mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    energy = 4 * (variance + 1e-4) / ((x - mean) ** 2 + 2 * variance + 2e-4)
    gate = sigmoid(1 / energy)
    return x * gate, gate.mean(-1)


def coordinate(p, s, x):
    def shared(v):
        z = norm(p["bn"], s["bn"], dense(p["reduce"], v))
        return z * np.clip(z + 3, 0, 6) / 6

    rows = sigmoid(dense(p["rows"], shared(x.mean(2))))
    columns = sigmoid(dense(p["columns"], shared(x.mean(1))))
    gate = rows[:, :, None] * columns[:, None]
    return x * gate, gate.mean(-1)


def triplet(p, s, x):
    total = 0
    for name, axis in (("wc", 1), ("hc", 2), ("hw", 3)):
        z = conv(p[f"{name}_conv"], np.stack([x.max(axis), x.mean(axis)], -1))[..., 0]
        n, t = p[f"{name}_bn"], s[f"{name}_bn"]
        z = (z - t["mean"]) / np.sqrt(t["var"] + 1e-5) * n["scale"] + n["bias"]
        total = total + np.expand_dims(sigmoid(z), axis)
    return x * total / 3, total.mean(-1) / 3


def double(p, s, x):
    b, h, w, c = x.shape
    flat = x.reshape(b, h * w, c)
    a, gather, distribute = (flat @ p[k]["kernel"][0, 0] for k in ("features", "gather", "distribute"))
    gather, distribute = softmax(gather, 1), softmax(distribute, 2)
    y, received = flat.copy(), np.zeros((b, h * w))
    for n in range(b):
        descriptors = a[n].T @ gather[n]
        y[n] += (descriptors @ distribute[n].T).T @ p["expand"]["kernel"][0, 0]
        # What a place gives to each other one, averaged.
        received[n] = (distribute[n] @ gather[n].T).mean(0)
    return y.reshape(x.shape), received.reshape(b, h, w)


def non_local(p, s, x):
    b, h, w, c = x.shape
    y, received = x.copy(), np.zeros((b, h, w))
    for n in range(b):
        flat = x[n].reshape(h * w, c)
        theta, phi, g = (flat @ p[k]["kernel"][0, 0] for k in ("theta", "phi", "g"))
        a = softmax(theta @ phi.T, 1)
        z = norm(p["bn"], s["bn"], a @ g @ p["expand"]["kernel"][0, 0])
        y[n] += z.reshape(h, w, c)
        received[n] = a.mean(0).reshape(h, w)
    return y, received


def mhsa(p, s, x, heads=4, max_distance=15):
    b, h, w, _ = x.shape
    q, k, v = (x @ p[name]["kernel"][0, 0] for name in ("q", "k", "v"))
    d = q.shape[-1] // heads
    out, received = np.zeros_like(q), np.zeros((b, h, w))

    def vector(table, distance):
        return p[table][int(np.clip(distance, -max_distance, max_distance)) + max_distance]

    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(h):
            for j in range(w):
                keys = np.stack(
                    [
                        [k[:, m, n, part] + vector("rows", m - i) + vector("columns", n - j) for n in range(w)]
                        for m in range(h)
                    ]
                )
                scores = np.einsum("bd,mnbd->bmn", q[:, i, j, part], keys) / np.sqrt(d)
                a = softmax(scores.reshape(b, -1), 1).reshape(b, h, w)
                out[:, i, j, part] = np.einsum("bmn,bmnd->bd", a, v[..., part])
                received += a / (heads * h * w)
    return x + out @ p["expand"]["kernel"][0, 0], received


def sge(p, s, x, groups):
    y, gates = np.zeros_like(x), []
    for n, part in enumerate(np.split(np.arange(x.shape[-1]), groups)):
        inner = np.einsum("bhwd,bd->bhw", x[..., part], x[..., part].mean((1, 2)))
        mean, deviation = inner.mean((1, 2), keepdims=True), inner.std((1, 2), keepdims=True)
        gates.append(sigmoid(p["gamma"][n] * (inner - mean) / (deviation + 1e-5) + p["beta"][n]))
        y[..., part] = x[..., part] * gates[-1][..., None]
    return y, np.mean(gates, 0)


def shuffle(p, s, x, groups):
    parts, gates = [], []
    for group in np.split(x, groups, -1):
        first, second = np.split(group, 2, -1)
        mean, variance = second.mean((1, 2), keepdims=True), second.var((1, 2), keepdims=True)
        z = p["weight"][1] * (second - mean) / np.sqrt(variance + 1e-5) + p["bias"][1]
        gate = sigmoid(p["weight"][0] * first.mean((1, 2), keepdims=True) + p["bias"][0])
        parts += [first * gate, second * sigmoid(z)]
        gates += [np.broadcast_to(gate, first.shape), sigmoid(z)]
    y = np.concatenate(parts, -1)
    half = x.shape[-1] // 2
    # Channel shuffle of two: the first of each half, the second of each half, ...
    order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair]
    return y[..., order], np.concatenate(gates, -1).mean(-1)


def large_kernel(p, s, x):
    c = x.shape[-1]
    a = conv(p["mix"], conv(p["far"], conv(p["near"], x, groups=c), dilation=3, groups=c))
    size = np.abs(a).mean(-1)
    return x * a, size / size.max((1, 2), keepdims=True)


def selective_kernel(p, s, x, branches=2, groups=32):
    u = [
        relu(norm(p[f"branch{m}_bn"], s[f"branch{m}_bn"], conv(p[f"branch{m}"], x, dilation=m, groups=groups)))
        for m in range(1, branches + 1)
    ]
    z = relu(norm(p["reduce_bn"], s["reduce_bn"], dense(p["reduce"], sum(u).mean((1, 2)))))
    scores = np.stack(np.split(z @ p["expand"]["kernel"], branches, -1))
    share = softmax(scores, 0)
    return sum(v * over_places(a) for v, a in zip(u, share, strict=True)), share[-1]


def gaussian_context(p, s, x, learned=False):
    z = x.mean((1, 2))
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    c = 3 * sigmoid(p["theta"]) + 1 if learned else 2
    gate = np.exp(-(z**2) / (2 * c**2))
    return x * over_places(gate), gate
