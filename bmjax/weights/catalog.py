"""The records of the published weight files, and the rule of each family and source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from bmjax import backbones
from bmjax.registry import unknown
from bmjax.weights.published import FAMILIES, Family
from bmjax.weights.record import Source, WeightRecord

_TIMM = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
_TIMM_COUNTER = "num_batches_tracked"


def rule(backbone: str, source: str) -> dict[str, Any]:
    """What the files of a backbone's family from a source have in common: fields of their records.

    Raises:
      ValueError: the backbone isn't known, or there is no rule for its family and that source.
    """
    module = backbones.family_of(backbone)
    name = module.__name__.rsplit(".", 1)[-1]
    if name not in FAMILIES or source not in FAMILIES[name].preprocess:
        pairs = (f"{family} of {s}" for family, common in FAMILIES.items() for s in common.preprocess)
        raise unknown("kind of weights", f"{name} of {source}", pairs)
    family = FAMILIES[name]
    model = backbones.create_backbone(backbone, **module.TIMM)
    if source == "keras":  # the defaults of the module are Keras's structure
        model = type(model)()
    return {
        "backbone": backbone,
        "source": cast(Source, source),
        "preprocess": family.preprocess[source],
        "unused": family.unused if source == "keras" else (_TIMM_COUNTER,),
        "architecture": {field: getattr(model, field) for field in dict.fromkeys(("epsilon", *module.TIMM))},
    }


def _records(family: Family) -> Iterator[WeightRecord]:
    for member in family.members:
        for top, (md5, values) in ((False, member.no_top), (True, member.top)):
            yield WeightRecord(
                **rule(member.backbone, "keras"),
                name=f"{member.backbone}-keras{member.variant}{'-top' if top else ''}",
                top=top,
                parameters=values,
                input_size=member.size,
                checksum=md5 and f"md5:{md5}",
                url=f"{member.place}{'' if top else family.suffix}.h5",
                licence=family.licence,
                origin=family.origin,
            )
    for tag in family.tags:
        yield WeightRecord(
            **rule(tag.backbone, "timm"),
            name=f"timm-{tag.tag}",
            top=True,
            parameters=tag.values,
            input_size=tag.size,
            url=_TIMM.format(tag.tag),
            licence=tag.licence,
            origin="timm",
        )


RECORDS: tuple[WeightRecord, ...] = tuple(record for family in FAMILIES.values() for record in _records(family))


def find(backbone: str, top: bool = False, source: str = "keras") -> WeightRecord:
    """The record of a backbone's ImageNet weights. timm's single file, with top, serves for both.

    Raises:
      ValueError: there is none.
    """
    of_source = [r for r in RECORDS if r.source == source]
    for record in of_source:
        if record.backbone == backbone and (source == "timm" or record.top == top):
            return record
    raise unknown(f"backbone with published weights of {source}", backbone, {r.backbone for r in of_source})


def unpublished(backbone: str, source: str, name: str, *, top: bool) -> WeightRecord:
    """The record of a file that isn't in the catalog, by the rule of its family and source; `parameters` is 0.

    Raises:
      ValueError: there is no such rule.
    """
    size = next((r.input_size for r in RECORDS if r.backbone == backbone), 224)
    return WeightRecord(**rule(backbone, source), name=name, top=top, parameters=0, input_size=size)
