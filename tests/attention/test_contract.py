"""Every listed attention variant keeps the contract."""

import functools
import os

import jax
import pytest

from bmjax.analysis.contract.attention import CHECKS, examine
from bmjax.attention import create_attention, list_attention
from tests.helpers import formulas
from tests.helpers.variants import features

every_variant = pytest.mark.parametrize("name", list_attention())


def test_the_variants_are_listed_and_have_their_formulas():
    expected = "bam cbam coordinate double eca ese gather_excite gaussian_context global_context large_kernel mhsa "
    expected += "non_local none scse se selective_kernel sge shuffle simam soft style_recalibration triplet"
    assert set(expected.split()) <= set(list_attention())
    assert all(hasattr(formulas, name) for name in expected.split())


@pytest.mark.accelerator
@every_variant
def test_the_contract_is_kept(name):
    verdicts = examine(functools.partial(create_attention, name))
    assert [v.name for v in verdicts] == list(CHECKS)
    # With the devices that there are, the check over four CPU devices may have too few.
    enough = {"ok", "not run"} if os.environ.get("BMJAX_TEST_ACCELERATOR") else {"ok"}
    assert [v for v in verdicts if v.status not in enough] == []


@every_variant
def test_a_stage_may_have_any_even_number_of_channels(name):
    for c in (2, 14, 136):
        jax.eval_shape(create_attention(name).init, jax.random.key(0), features((1, 2, 2, c)))
