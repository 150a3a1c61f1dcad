"""Every listed attention variant keeps the contract, and begins as the identity behind the gate."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.analysis.contract.attention import CHECKS, examine
from bmjax.attention import IdentityGate, create_attention, list_attention
from tests.helpers import formulas
from tests.helpers.variants import C, features, ordinary

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


@every_variant
def test_behind_the_gate_every_variant_starts_as_the_identity(name):
    x, out = features(), ordinary(name)["float32", True]
    gamma = {"params": {"gamma": jnp.zeros(C)}}
    assert np.array_equal(IdentityGate().apply(gamma, x, out["y"]), x)
    gradient = jax.grad(lambda v: (IdentityGate().apply(v, x, out["y"]) * features(seed=5)).sum())(gamma)
    assert np.array_equal(gradient["params"]["gamma"] != 0, np.any(out["y"] != x, (0, 1, 2)))
