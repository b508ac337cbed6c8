"""The behaviour term (ours): predicted networks should answer as their targets do."""

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_common.population import Population


class BehaviourLoss:
    r"""KL divergence of the predicted network's outputs from the target's, on random training inputs.

    .. math:: L_b = \frac{1}{m} \sum_{i=1}^m KL(softmax f_{\theta^*}(x_i) \| softmax f_{\hat\theta_0}(x_i))

    It stands beside the error in weight space, which it cannot replace: alone it finds other weights with the same
    outputs, and the model no longer describes checkpoints.

    Args:
        population: The task network, evaluated for many weights at once.
        inputs: Training inputs to draw from, (images, ...).
        batch: m, the number drawn for one call.
    """

    def __init__(self, population: Population, inputs: Tensor, batch: int) -> None:
        self.population, self.inputs, self.batch = population, inputs, min(batch, len(inputs))

    def __call__(self, predicted: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Divergence in nats (b,) of raw weights ``predicted`` (b, D) from ``target`` (b, D); differentiable."""
        chosen = torch.randint(len(self.inputs), (self.batch,), generator=generator, device=generator.device)
        inputs = self.inputs[chosen.to(self.inputs.device)]
        with torch.no_grad():
            wanted = self.population(target, inputs).log_softmax(-1)
        got = self.population(predicted, inputs).log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean(-1)
