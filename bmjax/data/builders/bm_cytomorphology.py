"""The marrow collection of Matek et al. (TCIA 2021) as a TFDS builder, from the tree that the user has downloaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from bmjax.data.sources.folder import images_below

CLASSES = {
    "ABE": "abnormal eosinophil",
    "ART": "artefact",
    "BAS": "basophil",
    "BLA": "blast",
    "EBO": "erythroblast",
    "EOS": "eosinophil",
    "FGC": "faggot cell",
    "HAC": "hairy cell",
    "KSC": "smudge cell",
    "LYI": "immature lymphocyte",
    "LYT": "lymphocyte",
    "MMZ": "metamyelocyte",
    "MON": "monocyte",
    "MYB": "myelocyte",
    "NGB": "band neutrophil",
    "NGS": "segmented neutrophil",
    "NIF": "not identifiable",
    "OTH": "other cell",
    "PEB": "proerythroblast",
    "PLM": "plasma cell",
    "PMO": "promyelocyte",
}
COUNTS = {
    "ABE": 8,
    "ART": 19_630,
    "BAS": 441,
    "BLA": 11_973,
    "EBO": 27_395,
    "EOS": 5_883,
    "FGC": 47,
    "HAC": 409,
    "KSC": 42,
    "LYI": 65,
    "LYT": 26_242,
    "MMZ": 3_055,
    "MON": 4_040,
    "MYB": 6_557,
    "NGB": 9_968,
    "NGS": 29_424,
    "NIF": 3_538,
    "OTH": 294,
    "PEB": 2_740,
    "PLM": 7_629,
    "PMO": 11_994,
}
SEVEN = ("BLA", "EOS", "LYT", "MON", "NGS", "NIF", "PMO")
# What the tree is called as TCIA and as Kaggle give it.
FOLDERS = ("BM_cytomorphology_data", "bone_marrow_cell_dataset")
CITATION = """@misc{matek2021marrow,
  title = {An Expert-Annotated Dataset of Bone Marrow Cytology in Hematologic Malignancies},
  author = {Matek, Christian and Krappe, Sebastian and M{\\"u}nzenmayer, Christian and Haferlach, Torsten and
            Marr, Carsten},
  year = {2021},
  publisher = {The Cancer Imaging Archive},
  doi = {10.7937/TCIA.AXH3-T579}
}"""


@dataclasses.dataclass(eq=False, kw_only=True)
class CytomorphologyConfig(tfds.core.BuilderConfig):
    """A choice and grouping of the 21 classes: abbreviation -> class. Images of other abbreviations are left out."""

    mapping: Mapping[str, str]
    complete: bool = True
    """The published number of images of each abbreviation is required."""

    def __post_init__(self) -> None:
        if odd := sorted(set(self.mapping) - set(CLASSES)):
            raise ValueError(f"mapping of {', '.join(odd)}; expected abbreviations among {', '.join(CLASSES)}")
        if len(set(self.mapping.values())) < 2:
            raise ValueError(f"mapping to {', '.join(set(self.mapping.values())) or 'nothing'}; expected two classes")


class BmCytomorphology(tfds.core.GeneratorBasedBuilder):
    """171,374 expert-labelled cells of 945 patients, 250x250 JPEG; no patient is known of any image.

    TCIA publishes no checksum of the images; in its place the number of images of each class is checked.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (TFDS reads it from the class)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the collection from The Cancer Imaging Archive, DOI 10.7937/TCIA.AXH3-T579, or its copy on Kaggle, "
        f"unpack it, and give the folder that holds {' or '.join(FOLDERS)}."
    )
    BUILDER_CONFIGS = [  # noqa: RUF012
        CytomorphologyConfig(name="all", description="All 21 classes.", mapping={name: name for name in CLASSES}),
        CytomorphologyConfig(name="seven", description=", ".join(SEVEN), mapping={name: name for name in SEVEN}),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config: Any = self.builder_config
        names = sorted(set(config.mapping.values()))
        members = {name: [f"{k}: {CLASSES[k]}" for k, v in config.mapping.items() if v == name] for name in names}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.__doc__} {config.description}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=names),
                    "path": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.7937/TCIA.AXH3-T579",
            citation=CITATION,
            license="CC BY 4.0",
            metadata=tfds.core.MetadataDict(classes=members),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {"train": self._generate_examples(find_tree(Path(dl_manager.manual_dir)))}

    def _generate_examples(self, root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        config: Any = self.builder_config
        paths = {path: class_of(root, path) for path in images_below(root)}
        counts = Counter(paths.values())
        wrong = [f"{k} {counts[k]} (published: {COUNTS[k]})" for k in config.mapping if counts[k] != COUNTS[k]]
        if config.complete and wrong:
            raise ValueError(f"{root}: images found: {', '.join(wrong)}; expected the whole collection")
        for path, abbreviation in paths.items():
            if abbreviation in config.mapping:
                label = config.mapping[abbreviation]
                yield path, {"image": str(root / path), "label": label, "path": path}


def find_tree(folder: Path) -> Path:
    """The folder of the classes' folders: one of `FOLDERS` in `folder`, or `folder` itself.

    Raises:
      FileNotFoundError: neither holds a class's folder.
    """
    for root in (*(folder / name for name in FOLDERS), folder):
        if any((root / name).is_dir() for name in CLASSES):
            return root
    raise FileNotFoundError(f"{folder}: expected {' or '.join(FOLDERS)} there, or folders {', '.join(CLASSES)}")


def class_of(root: Path, path: str) -> str:
    """The abbreviation that a file's name begins with: BLA of BLA/0001-1000/BLA_00001.jpg.

    Raises:
      ValueError: no such abbreviation, or the file lies in another class's folder.
    """
    folder, name = path.split("/")[0], path.split("/")[-1]
    abbreviation = name.split("_")[0]
    if abbreviation not in CLASSES or (folder in CLASSES and folder != abbreviation):
        raise ValueError(f"{root / path}: expected a name that begins with its class, as BLA_ in BLA")
    return abbreviation
