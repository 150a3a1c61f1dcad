"""The record of a weight file: where it is from, how it is checked, and what it needs of its user."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Source = Literal["keras", "timm"]


@dataclasses.dataclass(frozen=True)
class WeightRecord:
    """One weight file. The network and its input follow from it, never from the caller."""

    name: str
    backbone: str
    source: Source
    """Whose structure and naming the weights were made for."""
    top: bool
    """Whether the file holds the classes' layer; it is left out where a backbone has none."""
    parameters: int
    """The exact number of values, statistics included."""
    input_size: int
    """Side of the images in pixels that the network was published for."""
    preprocess: str
    """Mode of bmjax.weights.preprocess."""
    architecture: dict[str, Any]
    """Fields of the backbone's module that the source decides: epsilon, place of strides, padding, biases."""
    checksum: str = ""
    """`md5:<hex>` or `sha256:<hex>` of the file, `leaves:<hex>` of a ported file's arrays; empty: not known."""
    url: str = ""
    unused: tuple[str, ...] = ()
    """What the file holds beside the network: layers (Keras) or last words of keys (timm)."""
    licence: str = ""
    origin: str = ""

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""
        return f"{self.name}.safetensors" if self.source == "timm" else self.url.rsplit("/", 1)[-1]


def record_to_dict(record: WeightRecord) -> dict[str, Any]:
    """What JSON can hold; `record_from_dict` gives an equal record."""
    return dataclasses.asdict(record)


def record_from_dict(values: Any) -> WeightRecord:
    """The record that `record_to_dict` told.

    Raises:
      ValueError: a field is missing or has the wrong type; names the first such field.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(WeightRecord).validate_python(values)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from e
