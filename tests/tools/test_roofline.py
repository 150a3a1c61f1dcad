"""The model of cost counts what is known of convolutions."""

from tools.bench import roofline as tool


def test_gradients_cost_what_the_forward_pass_costs():
    """Each convolution's two gradients have its FLOPs; the first one has no input gradient."""
    found, parameters = tool.costs("resnet_tiny", 64, 4)
    ways = ("forward", "kernel", "input")
    total = {way: sum(cost.flops for kind, cost in found.items() if kind.startswith(way)) for way in ways}
    assert total["forward"] == total["kernel"] > 0
    assert total["input"] == total["forward"] - found["forward 7x7"].flops
    assert parameters > 0


def test_a_kinds_time_is_the_slower_of_computing_and_moving():
    device = tool.Device("d", compute=100.0, bandwidth=10.0)
    assert tool.Cost(1, flops=200.0, numbers=1.0).seconds(device) == 2.0
    assert tool.Cost(1, flops=200.0, numbers=10.0).seconds(device) == 4.0


def test_what_is_fused_costs_nothing():
    found = {"forward 3x3": tool.Cost(1, 200.0, 1.0), "norms' sums, forward": tool.Cost(1, 1.0, 10.0)}
    device = tool.Device("d", compute=100.0, bandwidth=10.0)
    assert device.step_seconds(found) == 6.0
    assert tool.dataclasses.replace(device, fuses=True).step_seconds(found) == 2.0
