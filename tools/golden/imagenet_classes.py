"""Writes bmjax/weights/imagenet_classes.txt from timm's wheel, which isn't installed for it:

python -m pip download --no-deps timm==1.0.31 && python tools/imagenet_classes.py timm-1.0.31-py3-none-any.whl
"""

import sys
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "bmjax/weights/imagenet_classes.txt"
HEAD = """\
# The 1000 classes of ImageNet (ILSVRC 2012) in the order of the networks' outputs: synset, tab, WordNet's words for it.
# From timm 1.0.31 (Apache-2.0), timm/data/_info; the words are WordNet's (WordNet 3.0 licence, Princeton University).
# Made by tools/imagenet_classes.py.
"""


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        words, synsets = (
            archive.read(f"timm/data/_info/{name}.txt").decode()
            for name in ("imagenet_synset_to_lemma", "imagenet_synsets")
        )
    lemmas = dict(line.split("\t") for line in words.splitlines())
    # The networks' classes are in the order of the synsets' numbers.
    lines = [f"{synset}\t{lemmas[synset]}\n" for synset in sorted(synsets.split())]
    TARGET.write_text(HEAD + "".join(lines), encoding="utf-8")
    print(f"{len(lines)} classes written")


if __name__ == "__main__":
    main(sys.argv[1])
