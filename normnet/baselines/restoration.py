"""VAE restoration: change an image until the VAE finds it likely (PAPER.md IV-C; You et al., 2019)."""

from __future__ import annotations

import torch

from normnet.baselines.variational import VAE, gaussian_kl

FIRST_STEP = 0.01
"""Of the descent, per unit of gradient; each slice finds its own from there."""
GROWTH, SHRINKAGE = 1.2, 0.5
"""Of that step, after one that helped and after one that did not."""


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Sum of absolute differences between neighbours, (b, 1, y, x) to (b,)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).sum(dim=1)
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().flatten(1).sum(dim=1)
    return down + across


class VAERestoration(VAE):
    r"""The VAE, read by what has to be changed to make a slice likely.

    Notes
    -----
    :math:`\min_x \sum|x - d(\mu(x))| + \alpha N\, KL(q(z|x) \| N(0, I)) + \lambda TV(x - y)` for the slice y
    with N pixels: the negative bound of the VAE, and a total variation that keeps changes together. Descent
    takes a step only where it lowers the objective, so that it never rises.
    """

    def objective(self, images: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return the objective of each slice, (b,)."""
        mean, log_variance = self.encode(images)
        error = (images - self.decode(mean)).abs().flatten(1).sum(dim=1)
        pixels = images[0].numel()
        prior = self.config.kl_weight * pixels * gaussian_kl(mean, log_variance)
        return error + prior + self.config.restoration_weight * total_variation(images - given)

    def restore(self, given: torch.Tensor) -> torch.Tensor:
        """Return the restored slices, in [0, 1]; in evaluation mode."""
        current = given.detach().clone()
        pace = torch.full((len(given), 1, 1, 1), FIRST_STEP, device=given.device, dtype=given.dtype)
        for _ in range(self.config.restoration_steps):
            with torch.enable_grad():
                inputs = current.requires_grad_()
                value = self.objective(inputs, given)
                (gradient,) = torch.autograd.grad(value.sum(), inputs)
            with torch.no_grad():
                tried = (inputs - pace * gradient).clamp(0, 1)
                better = (self.objective(tried, given) < value).view(-1, 1, 1, 1)
                current = torch.where(better, tried, inputs)
                pace = pace * torch.where(better, GROWTH, SHRINKAGE)
        return current.detach()

    def anomaly(self, images: torch.Tensor) -> torch.Tensor:
        """Return the difference of `images` and the restored ones."""
        return self.difference(images, self.restore(images))
