"""The audit: what is planted is found and named, and clean data pass."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from bmjax.analysis.audit import checks as audits
from bmjax.analysis.audit import shortcuts
from bmjax.analysis.audit.checks import audit
from bmjax.analysis.audit.page import write_audit
from bmjax.cli.main import main
from bmjax.config import Config, DataConfig, to_json
from bmjax.data.sources.cells import CLASSES
from bmjax.data.sources.synthetic import render

PER_CLASS = 14


@pytest.fixture(autouse=True)
def small_forests(monkeypatch):
    monkeypatch.setattr(shortcuts, "TREES", 20)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Rendered cells of three classes, as files."""
    root = tmp_path_factory.mktemp("clean")
    for name in CLASSES[:3]:
        (root / name).mkdir()
        for i in range(PER_CLASS):
            Image.fromarray(render(name, 64, 0, i)).save(root / name / f"{name}_{i:03d}.png")
    return root


@pytest.fixture
def tree(clean, tmp_path):
    """A copy of the clean files, to be spoilt."""
    for path in clean.rglob("*.png"):
        target = tmp_path / "tree" / path.relative_to(clean)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "tree"


@pytest.fixture
def settings(tmp_path):
    return DataConfig(
        source="folder", image_size=64, split=(0.4, 0.3, 0.3), stratify=True, cache_dir=str(tmp_path / "c")
    )


def found(audited, subject, level=None):
    return [f for f in audited.findings if f.subject == subject and level in (None, f.level)]


def test_clean_data_pass(clean, settings, monkeypatch):
    monkeypatch.setattr(audits, "FEW", 1)
    audited = audit(dataclasses.replace(settings, root=str(clean)))
    assert not audited.broken
    assert not [f for f in audited.findings if f.subject != "shortcuts"]
    assert len(audited.pairs) == 0
    metadata = next(s for s in audited.shortcuts if s.name == "metadata")
    assert metadata.low <= metadata.chance <= metadata.high


def test_everything_planted_is_found(tree, settings, tmp_path):
    first, second, third = CLASSES[:3]
    (tree / first / "cut.png").write_bytes((tree / first / f"{first}_000.png").read_bytes()[:300])
    Image.open(tree / first / f"{first}_001.png").save(tree / first / "named.jpg", "PNG")
    Image.open(tree / second / f"{second}_000.png").resize((160, 64)).save(tree / second / "wide.png")
    Image.open(tree / second / f"{second}_001.png").resize((24, 24)).save(tree / second / "small.png")
    Image.new("RGB", (64, 64), (220, 220, 220)).save(tree / second / "blank.png")
    (tree / third / "copied.png").write_bytes((tree / first / f"{first}_002.png").read_bytes())
    for i in range(4, 12):
        turned = Image.open(tree / third / f"{third}_{i:03d}.png").transpose(Image.Transpose.ROTATE_90)
        turned.save(tree / third / f"turned_{i}.png")
    config = dataclasses.replace(settings, root=str(tree))
    audited = audit(config)
    assert audited.broken
    said = [(name, f.text) for f in found(audited, "files") for name in f.images]
    for name, words in (
        (f"{first}/cut.png", "can't be read"),
        (f"{first}/named.jpg", "of another kind than the name says"),
        (f"{second}/wide.png", "far from square"),
        (f"{second}/small.png", "to be enlarged"),
    ):
        assert [text for other, text in said if other == name and words in text], (name, said)
    assert found(audited, "images")[0].images == (f"{second}/blank.png",)
    (conflict,) = found(audited, "labels", "error")
    assert set(conflict.images) == {f"{first}/{first}_002.png", f"{third}/copied.png"}
    (torn,) = found(audited, "split", "error")
    assert "--data.duplicates" in torn.text
    assert all("turned" in name or third in name for name in torn.images if name.startswith(third))

    # What it writes: the page, the record, and the list that mends the split.
    page = write_audit(audited, tmp_path / "out").read_text()
    assert page.count("<img") == 2
    record = json.loads((tmp_path / "out/audit.json").read_text())
    assert {f["level"] for f in record["findings"]} >= {"error", "warning"}
    assert record["data"]["n"] == len(audited.dataset)
    turned = [p for p in record["near_duplicates"] if "turned" in p["second"]["path"]]
    assert len(turned) == 8
    assert all(p["certain"] for p in turned)
    with (tmp_path / "out/near_duplicates.csv").open() as f:
        assert f"{third}/turned_4.png" in {row["path"] for row in csv.DictReader(f)}
    config = dataclasses.replace(config, duplicates=str(tmp_path / "out/near_duplicates.csv"), strict=True)
    mended = audit(config)
    assert not found(mended, "split", "error")
    assert [f.images for f in found(mended, "files", "error")] == [(f"{first}/cut.png",)]


def test_a_given_split_that_tears_copies_and_patients_apart(tree, tmp_path):
    names = [f"{c}/{c}_{i:03d}.png" for c in CLASSES[:3] for i in range(PER_CLASS)]
    first = CLASSES[0]
    (tree / first / "again.png").write_bytes((tree / names[0]).read_bytes())
    rows = [[name, name.split("/")[0], ("train", "val", "test")[i % 3], f"p{i // 3}"] for i, name in enumerate(names)]
    rows.append([f"{first}/again.png", first, "val", ""])
    with (tree / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["path", "label", "split", "group"], *rows])
    config = DataConfig(source="table", root=str(tree / "table.csv"), image_size=64, cache_dir=str(tmp_path / "cache"))
    audited = audit(config)
    texts = [f.text for f in found(audited, "split", "error")]
    assert [text.split(" stand")[0] for text in texts] == [
        "byte for byte copies",
        "near duplicates",
        "images of one group (patient, slide)",
    ]
    assert "leave out all but one" in texts[1]


def test_no_split_at_all_is_a_finding(clean, settings):
    for wrong, words in (({"split": (0.98, 0.01, 0.01)}, "has none in the"), ({"split_by": "group"}, "has no group")):
        audited = audit(dataclasses.replace(settings, root=str(clean), **wrong))
        assert words in found(audited, "split", "error")[0].text
        assert audited.splits is None


@pytest.mark.parametrize("where", ["border", "metadata"])
def test_a_planted_shortcut_is_an_error(tree, settings, where):
    for path in (tree / CLASSES[0]).iterdir():
        image = Image.open(path).convert("RGB")
        if where == "border":
            pixels = np.array(image)
            pixels[:2], pixels[-2:] = (250, 10, 10), (250, 10, 10)
            Image.fromarray(pixels).save(path)
        else:
            image.save(path.with_suffix(".jpg"), quality=95)
            path.unlink()
    audited = audit(dataclasses.replace(settings, root=str(tree)))
    words = {"border": "outermost", "metadata": "compression"}[where]
    (error,) = [f for f in found(audited, "shortcuts", "error") if words in f.text]
    assert f"nearly without error {CLASSES[0]}" in error.text


@pytest.mark.parametrize("spread", [True, False])
def test_laboratories_are_looked_at(clean, tmp_path, spread):
    """Classes from every laboratory alike are fine; one from a laboratory of its own is told by it."""
    names = [f"{c}/{c}_{i:03d}.png" for c in CLASSES[:3] for i in range(PER_CLASS)]
    rows = []
    for i, name in enumerate(names):
        label = name.split("/")[0]
        rows.append([str(clean / name), label, "AB"[i % 2] if spread else "AB"[label == CLASSES[0]]])
    rows[1][2] = ""
    with (tmp_path / "table.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["path", "label", "laboratory"], *rows])
    table = str(tmp_path / "table.csv")
    audited = audit(DataConfig(source="table", root=table, image_size=64, cache_dir=str(tmp_path / "cache")))
    told = [f for f in found(audited, "shortcuts", "error") if "laboratories' names" in f.text]
    assert len(told) == (not spread)
    assert not told or f"nearly without error {CLASSES[0]}" in told[0].text

    page = write_audit(audited, tmp_path / "out").read_text()
    assert "<h2>Laboratories</h2>" in page
    assert "unknown" in page
    record = json.loads((tmp_path / "out/audit.json").read_text())["laboratories"]
    assert list(record) == ["", "A", "B"]
    half = PER_CLASS // 2
    assert record["B"]["images"][CLASSES[0]] == (half - 1 if spread else PER_CLASS - 1)
    assert record["B"]["images"][CLASSES[1]] == (half if spread else 0)
    assert record["B"]["statistics"]["red"] > 0


def test_wrong_labels_are_found():
    """A tenth of the labels is wrong; the features tell the classes well."""
    rng = np.random.default_rng(0)
    true = np.arange(300) % 3
    features = rng.normal(size=(300, 8)) + 4 * np.eye(8)[true]
    labels = true.copy()
    wrong = rng.choice(300, 30, replace=False)
    labels[wrong] = (true[wrong] + 1) % 3
    rows, probs = shortcuts.likely_label_errors(features, labels, np.arange(300), 3)
    hits = set(rows[:30].tolist()) & set(wrong.tolist())
    assert len(hits) >= 27
    assert len(rows) <= 40
    assert (probs[wrong].argmax(-1) == true[wrong]).mean() > 0.9


def test_no_row_is_judged_by_its_copy():
    """Random labels, each image twice: whoever sees the copy is always right."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    features, labels = np.repeat(rng.normal(size=(100, 3)), 2, axis=0), np.repeat(rng.integers(0, 2, 100), 2)
    nearest = KNeighborsClassifier(1)
    apart = shortcuts.out_of_fold(nearest, features, labels, np.repeat(np.arange(100), 2), 2).argmax(-1)
    torn = shortcuts.out_of_fold(nearest, features, labels, np.arange(200), 2).argmax(-1)
    assert (torn == labels).mean() > 0.7
    assert (apart == labels).mean() < 0.65


def test_command(clean, settings, tmp_path, capsys):
    from bmjax.config import ModelConfig

    model = ModelConfig(backbone="resnet_tiny", weights=None)
    config = Config(data=dataclasses.replace(settings, root=str(clean)), model=model)
    (tmp_path / "config.json").write_text(to_json(config))
    out = tmp_path / "found"
    assert (
        main(
            ["data", "audit", str(tmp_path / "config.json"), "--data.split_seed", "1", "--features", "--out", str(out)]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "42 images in 3 classes" in printed
    record = json.loads((out / "audit.json").read_text())
    assert record["config"]["split_seed"] == 1
    assert isinstance(record["label_errors"], list)
    assert "asked only of images it did not see" in (out / "audit.html").read_text()
    assert main(["data", "audit", str(tmp_path / "config.json"), "--out", str(tmp_path / "config.json")]) == 2
    assert "config.json', which is a file; expected a folder" in capsys.readouterr().err
    assert main(["data", "audit", str(tmp_path / "config.json"), "--data.source", "synthetic"]) == 2
    assert "'data.source' is 'synthetic'" in capsys.readouterr().err
