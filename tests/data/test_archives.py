"""Zip and tar files: read as the folder they were made of; whatever could lead out of them is refused."""

import io
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from bmjax.config import DataConfig
from bmjax.data.load import load_dataset
from bmjax.data.sources import archive as archives
from bmjax.data.sources.archive import list_archive


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


FILES = {f"{name}/{i}.png": png(10 * k + i) for k, name in enumerate(("BLA", "NGS")) for i in range(3)}


def write(path, files, prefix=""):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(prefix + name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(prefix + name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize("prefix", ["", "top/", "top/deeper/"])
def test_as_the_folder_it_was_made_of(tmp_path, suffix, prefix):
    for name, data in FILES.items():
        (tmp_path / "cells" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cells" / name).write_bytes(data)
    others = {"BLA/notes.txt": b"text", "NGS/.hidden.png": b"", "README.md": b"", "BLA/more.zip": b"PK"}
    path = write(tmp_path / f"a.{suffix}", FILES | others, prefix)
    config = DataConfig(source="archive", root=str(path), image_size=16, cache_dir=str(tmp_path / "cache"))
    packed = load_dataset(config, progress=False)
    plain = load_dataset(
        DataConfig(**{**vars(config), "source": "folder", "root": str(tmp_path / "cells")}), progress=False
    )
    assert packed.classes == plain.classes
    assert packed.ids == tuple(prefix + name for name in plain.ids)
    assert packed.hashes == plain.hashes
    np.testing.assert_array_equal(packed.images, plain.images)
    np.testing.assert_array_equal(packed.labels, plain.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "cells", "cache"])


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_names_as_windows_and_others_write_them(tmp_path, suffix):
    for change in (
        lambda name: name.replace("/", "\\"),
        lambda name: f"./{name}",
        lambda name: name.replace("/", "//"),
    ):
        listing = list_archive(write(tmp_path / f"a.{suffix}", {change(name): data for name, data in FILES.items()}))
        assert listing.ids == tuple(FILES)
        assert listing.classes == ("BLA", "NGS")
        assert [listing.read(i) for i in range(6)] == list(FILES.values())
    path = write(tmp_path / "twice.zip", FILES | {"BLA\\0.png": b""})
    with pytest.raises(ValueError, match=r"'BLA\\\\0\.png' is there twice"):
        list_archive(path)


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize("name", ["top/PMO/notes.txt", "top/PMO/deep/x.doc"])
def test_a_class_without_an_image_is_refused_as_in_a_folder(tmp_path, suffix, name):
    path = write(tmp_path / f"a.{suffix}", {f"top/{name}": data for name, data in FILES.items()} | {name: b""})
    with pytest.raises(ValueError, match=r"PMO holds no image"):
        list_archive(path)
    beside = {"top/@eaDir/x.txt": b"", "__MACOSX/top/._BLA": b"", "other/notes.txt": b"", "top/.git/config": b""}
    path = write(tmp_path / f"a.{suffix}", {f"top/{name}": data for name, data in FILES.items()} | beside)
    assert list_archive(path).classes == ("BLA", "NGS")


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize(
    "name", ["../out.png", "BLA/../../out.png", "/etc/out.png", "C:/out.png", "BLA\\..\\..\\out.png"]
)
def test_paths_that_lead_out_are_refused(tmp_path, suffix, name):
    path = write(tmp_path / f"a.{suffix}", FILES | {name: png()})
    with pytest.raises(ValueError, match=r"is absolute or leads out of the archive"):
        list_archive(path)


def test_links_and_devices_are_refused(tmp_path):
    path = write(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("BLA/link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"member 'BLA/link\.png' is a link"):
        list_archive(path)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        path = write(tmp_path / "a.tar", FILES)
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("BLA/link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        with pytest.raises(ValueError, match=r"member 'BLA/link\.png' is a link or a device"):
            list_archive(path)


def test_bombs_and_damage_are_named_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    path = write(tmp_path / "a.zip", FILES | {"BLA/bomb.png": bytes(1_000_000), "NGS/short.png": png()[:-30]})
    assert path.stat().st_size < 20_000
    data = bytearray(path.read_bytes())
    at = data.index(b"NGS/1.png") + 200
    data[at] ^= 0xFF
    path.write_bytes(data)
    config = DataConfig(source="archive", root=str(path), image_size=16, cache_dir=str(tmp_path / "cache"))
    dataset = load_dataset(config, progress=False)
    reasons = dict(dataset.skipped)
    assert reasons.keys() == {"BLA/bomb.png", "NGS/1.png", "NGS/short.png"}
    assert reasons["BLA/bomb.png"] == "1000000 bytes; expected at most 100000"
    assert len(dataset) == 5


def test_a_damaged_directory_of_a_zip_is_named(tmp_path):
    path = write(tmp_path / "a.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02")] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip: Bad magic number"):
        list_archive(path)


def test_a_damaged_name_that_takes_an_image_out_of_its_class_is_named(tmp_path):
    path = write(tmp_path / "a.zip", FILES, "top/")
    whole = path.read_bytes()
    at = whole.rindex(b"top/NGS/2.png")  # in the list at the end
    path.write_bytes(whole[: at + 7] + b"x" + whole[at + 8 :])
    with pytest.raises(ValueError, match=r"NGSx2\.png' is b'top/NGS/2\.png' before its bytes; expected one name"):
        list_archive(path)


def test_a_cut_tar_is_named(tmp_path):
    path = write(tmp_path / "a.tar", FILES)
    data = path.read_bytes()
    last = data.rindex(b"NGS/2.png")
    for cut in (last, last + 100, last + 512 + 300):  # between two members, in a head, in a file
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.tar: .*(unexpected end of data|truncated header)"):
            list_archive(path)


def test_what_is_no_such_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'data.root' is '.*no\.zip'; expected a \.zip or \.tar file"):
        list_archive(tmp_path / "no.zip")
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="neither a zip nor a tar file"):
        list_archive(tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("BLA/a.png"))
    with pytest.raises(ValueError, match=r"a compressed tar has no random access; expected a plain \.tar or a \.zip"):
        list_archive(tmp_path / "a.tar.gz")
    for only in ({}, {"BLA/a.png": png()}, {"a.png": png(), "b.png": png()}):
        with pytest.raises(ValueError, match=r"folders of images found: .*expected at least two"):
            list_archive(write(tmp_path / "b.zip", only))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("BLA/a.png", png())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("BLA/a.png", png(1))
    with pytest.raises(ValueError, match=r"'BLA/a\.png' is there twice"):
        list_archive(tmp_path / "c.zip")
    locked = bytearray(write(tmp_path / "d.zip", FILES).read_bytes())
    entry = locked.index(b"PK\x01\x02")
    locked[entry + 8] |= 1  # the flag of an encrypted file, in the directory
    (tmp_path / "d.zip").write_bytes(locked)
    with pytest.raises(ValueError, match="is encrypted"):
        list_archive(tmp_path / "d.zip")
