"""A captured step, as far as a CPU can tell: when it is stale, and what its node in autograd keeps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from yolo_flash.graphs.graphed_step import FlashGraphError, GraphedStep, _Replay
from yolo_flash.graphs.signature import Signature


@pytest.mark.parametrize(
    "change",
    ["nothing", "memory", "frozen", "mode", "hook", "another module", "one module more", "parameter", "buffer"],
)
def test_a_changed_model_is_noticed_before_its_replay(change: str) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    graphed = GraphedStep.__new__(GraphedStep)  # without a card there is nothing to capture
    graphed._signature = Signature.of_model(model)
    assert not graphed.stale()
    if change == "memory":
        model[0].weight.data = model[0].weight.data.clone()
    elif change == "frozen":
        model[0].weight.requires_grad_(False)
    elif change == "mode":
        model[1].eval()
    elif change == "hook":
        model[1].register_forward_hook(lambda *args: None)
    elif change == "another module":
        model[1] = nn.BatchNorm2d(4)
    elif change == "one module more":
        model.append(nn.Identity())
    elif change == "parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif change == "buffer":
        model[1].running_mean = torch.zeros(4)
    assert graphed.stale() == (change != "nothing")


class Step(nn.Module):
    """What a node asks of the graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.outputs, self._upstream = [torch.tensor([4.0])], [torch.zeros(1)]

    def replay_forward(self, inputs: Any) -> int:
        return 1

    def replay_backward(self, number: int, gradients: Any) -> list[Tensor]:
        return [gradients[0] * 3]

    def accumulate(self, gradients: list[Tensor]) -> None:
        self.weight.grad = gradients[0]


@pytest.mark.parametrize("through", [True, False])
def test_a_loss_that_is_kept_keeps_no_graphs(through: bool) -> None:
    step: Any = Step()
    weight = step.weight
    parameters = [weight] if through else [torch.zeros((), requires_grad=True)]
    (loss,) = _Replay.apply(step, through, (), *parameters)
    left = weakref.ref(step)
    loss.backward(retain_graph=True)
    assert weight.grad.item() == 3
    del step
    gc.collect()
    assert left() is None
    with pytest.raises(FlashGraphError, match="differentiated twice"):
        loss.backward()
