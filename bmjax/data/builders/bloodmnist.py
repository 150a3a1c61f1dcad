"""BloodMNIST of MedMNIST+ (Yang et al. 2023) as a TFDS builder: eight kinds of normal blood cells, 28 to 224 pixels."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bmjax.download import fetch

CLASSES = {
    "basophil": "basophil",
    "eosinophil": "eosinophil",
    "erythroblast": "erythroblast",
    "immature_granulocyte": "myelocyte, metamyelocyte or promyelocyte",
    "lymphocyte": "lymphocyte",
    "monocyte": "monocyte",
    "neutrophil": "neutrophil",
    "platelet": "platelet",
}
COUNTS = {"train": 11_959, "val": 1_712, "test": 3_421}
CITATION = """@article{yang2023medmnist,
  title = {{MedMNIST} v2: A large-scale lightweight benchmark for {2D} and {3D} biomedical image classification},
  author = {Yang, Jiancheng and Shi, Rui and Wei, Donglai and Liu, Zequan and Zhao, Lin and Ke, Bilian and
            Pfister, Hanspeter and Ni, Bingbing},
  journal = {Scientific Data},
  volume = {10},
  number = {1},
  pages = {41},
  year = {2023}
}
@article{acevedo2020dataset,
  title = {A dataset of microscopic peripheral blood cell images for development of automatic recognition systems},
  author = {Acevedo, Andrea and Merino, Anna and Alf{\\'e}rez, Santiago and Molina, {\\'A}ngel and Bold{\\'u}, Laura and
            Rodellar, Jos{\\'e}},
  journal = {Data in Brief},
  volume = {30},
  pages = {105474},
  year = {2020}
}"""


@dataclasses.dataclass(eq=False, kw_only=True)
class BloodmnistConfig(tfds.core.BuilderConfig):
    """One size of the images; the checksum is the one that MedMNIST 3.0 gives."""

    size: int
    checksum: str

    @property
    def file_name(self) -> str:
        return "bloodmnist.npz" if self.size == 28 else f"bloodmnist_{self.size}.npz"

    @property
    def url(self) -> str:
        return f"https://zenodo.org/records/10519652/files/{self.file_name}?download=1"


_MD5 = {
    28: "7053d0359d879ad8a5505303e11de1dc",
    64: "2b94928a2ae4916078ca51e05b6b800b",
    128: "adace1e0ed228fccda1f39692059dd4c",
    224: "b718ff6835fcbdb22ba9eacccd7b2601",
}


class Bloodmnist(tfds.core.GeneratorBasedBuilder):
    """17,092 normal blood cells of eight kinds, centre-cropped and resized, with MedMNIST's own split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS reads it from the class)
    BUILDER_CONFIGS = [  # noqa: RUF012
        BloodmnistConfig(name=f"px{size}", description=f"{size}x{size} pixels.", size=size, checksum=f"md5:{md5}")
        for size, md5 in _MD5.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config: Any = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.__doc__} {config.description}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(config.size, config.size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "path": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://medmnist.com/",
            citation=CITATION,
            license="CC BY 4.0",
            metadata=tfds.core.MetadataDict(classes=CLASSES),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        config: Any = self.builder_config
        folder = Path(dl_manager.download_dir)
        npz = fetch(config, folder, otherwise="name the folder where it lies (bmjax data build --downloads)")
        return {split: self._generate_examples(npz, split) for split in COUNTS}

    def _generate_examples(self, npz: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        config: Any = self.builder_config
        with zipfile.ZipFile(npz) as archive, archive.open(f"{split}_labels.npy") as f:
            labels = np.lib.format.read_array(f, allow_pickle=False).ravel()
        shape = (COUNTS[split], config.size, config.size, 3)
        for i, image in enumerate(rows_of(npz, f"{split}_images.npy", shape)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            png.seek(0)
            yield f"{i:05d}", {"image": png, "label": int(labels[i]), "path": f"{i:05d}.png"}


def rows_of(npz: Path, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The rows of one uint8 array of an npz file, one at a time: at 224 pixels all of them fill gigabytes.

    Raises:
      ValueError: the array has another shape or type.
    """
    with zipfile.ZipFile(npz) as archive, archive.open(name) as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, fortran, dtype = read(f)
        if found != shape or dtype != np.uint8 or fortran:
            raise ValueError(f"{npz}: {name} is {dtype} {found}; expected uint8 {shape}")
        row = int(np.prod(shape[1:]))
        for _ in range(shape[0]):
            yield np.frombuffer(f.read(row), np.uint8).reshape(shape[1:])
