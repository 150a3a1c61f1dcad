"""What files are, without decoding them."""

import io

import numpy as np
import pytest
from PIL import Image

from bmjax.data.images.decode import FORMATS
from bmjax.data.images.inspection import ENDINGS, FileFacts, facts_of, inspect_files, metadata_features
from bmjax.data.sources.folder import list_folder


def data_of(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def test_facts():
    image = Image.new("RGB", (30, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = data_of(image, format="JPEG", quality=50, exif=exif)
    coarse = facts_of(data)
    assert coarse == FileFacts(len(data), "JPEG", "RGB", 30, 20, 1, True, coarse.quantisation)
    fine = facts_of(data_of(image, format="JPEG", quality=95))
    assert 1 < fine.quantisation < coarse.quantisation
    assert not fine.exif
    data = data_of(image.convert("L"), format="GIF", save_all=True, append_images=[Image.new("L", (30, 20), 90)])
    assert facts_of(data).frames == 2
    assert facts_of(data).quantisation == 0


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0 and no more"])
def test_no_image(data):
    with pytest.raises(ValueError, match=r"."):
        facts_of(data)


def test_every_format_has_endings():
    assert set(ENDINGS) == set(FORMATS)


def test_inspect_files_and_what_metadata_tell(tmp_path):
    for name, size in (("a", 20), ("b", 40)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, 20)).save(tmp_path / name / "1.png")
    (tmp_path / "b/2.png").write_bytes(b"no image")
    facts = inspect_files(list_folder(tmp_path))
    assert [f and f.width for f in facts] == [20, 40, None]
    features = metadata_features([f for f in facts if f])
    assert features.shape == (2, 7)
    assert np.flatnonzero(features[0] != features[1]).tolist() == [2]
