"""The published files as data, family by family; bmjax/weights/catalog.py makes a record of each.

Keras: places, checksums and sizes are those of keras/src/applications of Keras 3.15.1, preprocessing that of
`preprocess_input` there. timm: tags, sizes, mean and standard deviation are those of `default_cfgs` in timm/models of
timm 1.0.31; it gives no checksums. Licences are as keras-applications and timm state them. Values are counted with the
running statistics, and without what the record leaves unused.
"""

from __future__ import annotations

from typing import NamedTuple

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"


class Member(NamedTuple):
    """A network of keras.applications and its two files."""

    backbone: str
    place: str
    """Address of the file with top, without `.h5`."""
    size: int
    """Side of the images in pixels."""
    top: tuple[str, int]
    """md5 (empty: Keras gives none) and number of values of the file with top."""
    no_top: tuple[str, int]
    variant: str = ""
    """Tells files of one backbone apart; the one without comes first."""


class Tag(NamedTuple):
    """A network of timm, by its tag."""

    backbone: str
    tag: str
    size: int
    values: int
    licence: str = "Apache-2.0"


class Family(NamedTuple):
    """What the files of a family have in common."""

    preprocess: dict[str, str]
    """Mode by source. A source that isn't here is refused."""
    licence: str
    """Of Keras's files."""
    origin: str
    members: tuple[Member, ...]
    tags: tuple[Tag, ...] = ()
    suffix: str = "_notop"
    """What the address of a file without top has before `.h5`."""
    unused: tuple[str, ...] = ()
    """Layers of Keras's files that aren't the network's."""


def _densenet(depth: int, top: tuple[str, int], no_top: tuple[str, int]) -> Member:
    name = f"densenet{depth}"
    return Member(name, f"{_KERAS}/densenet/{name}_weights_tf_dim_ordering_tf_kernels", 224, top, no_top)


def _resnet(depth: int, top: tuple[str, int], no_top: tuple[str, int]) -> Member:
    name = f"resnet{depth}"
    return Member(name, f"{_KERAS}/resnet/{name}_weights_tf_dim_ordering_tf_kernels", 224, top, no_top)


def _efficientnet(number: int, size: int, top: tuple[str, int], no_top: tuple[str, int]) -> Member:
    name = f"efficientnetb{number}"
    return Member(name, f"https://storage.googleapis.com/keras-applications/{name}", size, top, no_top)


def _mobilenet_v2(backbone: str, alpha: str, top: int, no_top: int, sizes: tuple[int, ...] = (224,)) -> list[Member]:
    place = f"{_KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}"
    return [
        Member(backbone, f"{place}_{size}", size, ("", top), ("", no_top), variant="" if size == 224 else f"-{size}")
        for size in sizes
    ]


_SIZES = (224, 192, 160, 128, 96)

FAMILIES: dict[str, Family] = {
    "densenet": Family(
        preprocess={"keras": "torch", "timm": "torch"},
        licence="BSD-3-Clause",
        origin="keras.applications; converted from the authors' Torch models (Huang et al. 2017)",
        members=(
            _densenet(
                121, ("9d60b8095a5708f2dcce2bca79d332c7", 8_062_504), ("30ee3e1110167f948a6b9946edeeb738", 7_037_504)
            ),
            _densenet(
                169, ("d699b8f76981ab1b30698df4c175e90b", 14_307_880), ("b8c4d4c20dd625c148057b9ff1c1176b", 12_642_880)
            ),
            _densenet(
                201, ("1ceb130c1ea1b78c3bf6114dbdfd8807", 20_242_984), ("c13680b51ded0fb44dff2d8f86ac8bb1", 18_321_984)
            ),
        ),
        tags=(Tag("densenet121", "densenet121.ra_in1k", 224, 8_062_504),),
    ),
    "resnet": Family(
        preprocess={"keras": "caffe", "timm": "torch"},
        licence="MIT",
        origin="keras.applications; converted from the authors' Caffe models (He et al. 2016)",
        members=(
            _resnet(
                50, ("2cb95161c43110f7111970584f804107", 25_636_712), ("4d473c1dd8becc155b73f8504c6f6626", 23_587_712)
            ),
            _resnet(
                101, ("f1aeb4b969a6efcfb50fad2f0c20cfc5", 44_707_176), ("88cf7a10940856eca736dc7b7e228a21", 42_658_176)
            ),
            _resnet(
                152, ("100835be76be38e30d865e96f2aaae62", 60_419_944), ("ee4c566cf9a93f14d82f913c2dc6dd0c", 58_370_944)
            ),
        ),
        tags=(Tag("resnet50", "resnet50.a1_in1k", 224, 25_610_152),),
    ),
    "efficientnet": Family(
        preprocess={"keras": "torch", "timm": "torch"},
        licence="Apache-2.0",
        origin="keras.applications; converted from TensorFlow's TPU models (Tan and Le 2019)",
        unused=("normalization",),
        members=(
            _efficientnet(
                0, 224, ("902e53a9f72be733fc0bcb005b3ebbac", 5_330_564), ("50bc09e76180e00e4465e1a485ddc09d", 4_049_564)
            ),
            _efficientnet(
                1, 240, ("1d254153d4ab51201f1646940f018540", 7_856_232), ("74c4e6b3e1f6a1eea24c589628592432", 6_575_232)
            ),
            _efficientnet(
                2, 260, ("b15cce36ff4dcbd00b6dd88e7857a6ad", 9_177_562), ("111f8e2ac8aa800a7a99e3239f7bfb39", 7_768_562)
            ),
            _efficientnet(
                3,
                300,
                ("ffd1fdc53d0ce67064dc6a9c7960ede0", 12_320_528),
                ("af6d107764bb5b1abb91932881670226", 10_783_528),
            ),
            _efficientnet(
                4,
                380,
                ("18c95ad55216b8f92d7e70b3a046e2fc", 19_466_816),
                ("ebc24e6d6c33eaebbd558eafbeedf1ba", 17_673_816),
            ),
            _efficientnet(
                5,
                456,
                ("ace28f2a6363774853a83a0b21b9421a", 30_562_520),
                ("38879255a25d3c92d5e44e04ae6cec6f", 28_513_520),
            ),
            _efficientnet(
                6,
                528,
                ("165f6e37dce68623721b423839de8be5", 43_265_136),
                ("9ecce42647a20130c1f39a5d4cb75743", 40_960_136),
            ),
            _efficientnet(
                7,
                600,
                ("8c03f828fec3ef71311cd463b6759d99", 66_658_680),
                ("cbcfe4450ddf6f3ad90b1b398090fe4a", 64_097_680),
            ),
        ),
        tags=(Tag("efficientnetb5", "tf_efficientnet_b5.ns_jft_in1k", 456, 30_562_520),),
    ),
    "xception": Family(
        preprocess={"keras": "tf", "timm": "tf"},
        licence="MIT",
        origin="keras.applications; trained by its author (Chollet 2017)",
        members=(
            Member(
                "xception",
                f"{_KERAS}/xception/xception_weights_tf_dim_ordering_tf_kernels",
                299,
                ("0a58e3b7378bc2990ea3b43d5981f1f6", 22_910_480),
                ("b0042744bf5b25fce3cb969f33bebb97", 20_861_480),
            ),
        ),
        tags=(Tag("xception", "legacy_xception.tf_in1k", 299, 22_910_480),),
    ),
    "mobilenet_v2": Family(
        preprocess={"keras": "tf", "timm": "torch"},
        licence="Apache-2.0",
        origin="keras.applications; converted from TensorFlow's models (Sandler et al. 2018)",
        suffix="_no_top",
        members=(
            *_mobilenet_v2("mobilenet_v2", "1.0", 3_538_984, 2_257_984, _SIZES),
            *_mobilenet_v2("mobilenet_v2_035", "0.35", 1_691_208, 410_208, _SIZES),
            *_mobilenet_v2("mobilenet_v2_050", "0.5", 1_987_224, 706_224, _SIZES),
            *_mobilenet_v2("mobilenet_v2_075", "0.75", 2_663_064, 1_382_064, _SIZES),
            *_mobilenet_v2("mobilenet_v2_130", "1.3", 5_431_048, 3_766_048),
            *_mobilenet_v2("mobilenet_v2_140", "1.4", 6_156_712, 4_363_712),
        ),
        tags=(Tag("mobilenet_v2", "mobilenetv2_100.ra_in1k", 224, 3_538_984),),
    ),
}
