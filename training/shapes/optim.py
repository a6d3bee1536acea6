"""Muon for the matrices, AdamW for the rest, one schedule and a running average of the weights.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (momentum, then Newton-Schulz orthogonalisation).
"""

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


class Optimisers:
    """Both optimisers behind one `step(scale)`; `scale` in 0..1 is the schedule's factor on every learning rate."""

    def __init__(self, modules: list[nn.Module], muon_lr: float, adam_lr: float, weight_decay: float = 0.01):
        named = [item for module in modules for item in module.named_parameters()]
        self.params = [p for _, p in named]
        matrices = [p for name, p in named if p.ndim == 2 and min(p.shape) >= 32 and self._inner(name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.params if id(p) not in chosen]
        self.muon = Muon(matrices, muon_lr, weight_decay=weight_decay)
        self.adam = torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.rates = [(group, group["lr"]) for opt in (self.muon, self.adam) for group in opt.param_groups]

    @staticmethod
    def _inner(name: str) -> bool:
        return "blocks." in name or "layers." in name

    def step(self, scale: float) -> float:
        """One clipped update; returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.params, 1.0)
        for group, rate in self.rates:
            group["lr"] = rate * scale
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None
        return float(norm)


def schedule(progress: float, warmup: float = 0.02, flat: float = 0.4) -> float:
    """Warm up, hold until `flat`, then fall in a straight line to zero; progress in 0..1."""
    if progress < warmup:
        return max(0.02, progress / warmup)
    if progress < flat:
        return 1.0
    return max(0.0, (1 - progress) / (1 - flat))


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float = 0.995):
        self.decay, self.steps = decay, 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)
