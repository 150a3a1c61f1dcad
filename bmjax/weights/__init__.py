"""Pretrained weights: a catalog of files, readers of each layout, a strict merge, and the download.

`weights`, wherever it is asked for, is `imagenet` (Keras's published file), `imagenet-timm` (timm's), a record's name
(`bmjax weights list`), or the path of a file that a reader knows: whose it is shows in its content, not in its name.
"""

from bmjax.weights.load import find_record, load, load_into, read
from bmjax.weights.network import classes_of, network, network_shapes, top_layers
from bmjax.weights.port import backbone_of, port
from bmjax.weights.preprocess import preprocess

__all__ = [
    "backbone_of",
    "classes_of",
    "find_record",
    "load",
    "load_into",
    "network",
    "network_shapes",
    "port",
    "preprocess",
    "read",
    "top_layers",
]
