"""Entropy-SGD: an optimizer that looks for wide valleys."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.noise import keyed_generator


class EntropySGD(SGD):
    """SGD towards the mean of a short Langevin walk around the weights (Chaudhari et al., 2017).

    Each step of the walk takes a batch of its own: w' ← w' - η'(g(w') + wd·w' + γ(w' - w)) + noise,
    and a running mean μ ← β μ + (1 - β) w' is kept. After L of them the outer step is one of
    torch's SGD, with momentum and weight decay, on w - μ in the gradient's place. So every batch
    counts, the closure runs once a step, and schedules (which move the outer `lr`), clipping,
    accumulation, AMP and DDP need nothing special. A pass over the data has 1/L as many outer
    steps: the 150 epochs of a run hold what the paper's 150/L epochs of L batches a step do.

    The walk is without momentum, as in the paper's code. With L = 0 it is torch's SGD bit for bit.
    Between outer steps the weights are those of the walk; `finish` ends it early. Every module of
    this package gives it the run's seed, and ends a walk with the epoch or with training, so that
    measures and checkpoints at the end of an epoch see outer weights.

    Args:
        params: Parameters or groups.
        lr: Outer learning rate, which schedules move.
        momentum: Of the outer step. The paper's code runs without, by a slip.
        nesterov: Whether it is Nesterov's.
        weight_decay: In walk and outer step alike.
        langevin_steps: Steps L of the walk; 1 in Table 1, swept over 1, 2, 3 and 5.
        langevin_lr: Rate η' of the walk.
        noise: Scale ε of the walk's noise, ε sqrt(2 η') N(0, 1) a step.
        gamma: Pull γ towards the outer weights.
        scoping: γ grows by the factor 1 + scoping with each outer step; the original's 1e-3 is
            without effect in the paper's code and would reach 1e21 in its 58,650 steps. The pull
            never goes further than back to the outer weights.
        averaging: β of the running mean.
        seed: Of the noise; modules of this package set it to the run's.

    Attributes:
        cut_short: Whether the next step ends the walk, however long it is.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> weights = nn.Parameter(torch.ones(1))
        >>> optimizer = EntropySGD([weights], lr=1.0, momentum=0.0, nesterov=False,
        ...                        weight_decay=0.0, noise=0.0)
        >>> weights.sum().backward()
        >>> _ = optimizer.step()
        >>> weights  # 1 - lr (1 - β) η' g
        Parameter containing:
        tensor([0.9750], requires_grad=True)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        langevin_steps: int = 1,
        langevin_lr: float = 0.1,
        noise: float = 1e-4,
        gamma: float = 1e-4,
        scoping: float = 0.0,
        averaging: float = 0.75,
        seed: int = 0,
    ) -> None:
        check_count("langevin_steps", langevin_steps)
        check_number("averaging", averaging, high=1.0)
        for name, value in {
            "langevin_lr": langevin_lr,
            "noise": noise,
            "gamma": gamma,
            "scoping": scoping,
        }.items():
            check_number(name, value)
        super().__init__(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
        self.langevin_steps, self.langevin_lr, self.noise = langevin_steps, langevin_lr, noise
        self.gamma, self.scoping, self.averaging, self.seed = gamma, scoping, averaging, seed
        self.cut_short = self._ending = False
        # In a group, so that the optimizer's state dict holds it.
        self.param_groups[0].update(walked=0, inner_steps=0, outer_steps=0)

    @property
    def walking(self) -> bool:
        """Whether the weights are those of a walk that has not ended."""
        return bool(self.param_groups[0]["walked"])

    @property
    def pull(self) -> float:
        """The current γ, at most 1/η', which is all the way back."""
        grown = self.param_groups[0]["outer_steps"] * math.log1p(self.scoping)
        gamma = self.gamma * math.exp(min(grown, 700.0))
        return min(gamma, 1 / self.langevin_lr) if self.langevin_lr else gamma

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step of the walk, and the outer step where the walk is complete.

        Args:
            closure: Evaluates the loss and its gradients.

        Returns:
            The closure's loss.
        """
        if self.langevin_steps == 0:
            return self._outer_step(closure)
        if self._ending:
            self._end_walk()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._walk()
        if self.cut_short or self.param_groups[0]["walked"] == self.langevin_steps:
            self._end_walk()
        return loss

    def finish(self) -> None:
        """Ends the walk with the outer step; nothing happens where none has begun."""
        if not self.walking:
            return
        self._ending = True
        try:
            # Through `step`, so that what hangs on it, such as clipping, sees the outer weights.
            self.step()
        finally:
            self._ending = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another `EntropySGD`, or of an SGD, whose walks begin at zero."""
        super().load_state_dict(state_dict)
        for name in ("walked", "inner_steps", "outer_steps"):
            self.param_groups[0].setdefault(name, 0)

    def _end_walk(self) -> None:
        counts = self.param_groups[0]
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            walk = self.state.get(parameter, {})
            parameter.grad = None
            if "centre" in walk:
                parameter.copy_(walk["centre"])
                parameter.grad = walk.pop("centre") - walk.pop("mean")
        self._outer_step()
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        counts["walked"], counts["outer_steps"] = 0, counts["outer_steps"] + 1

    def _outer_step(self, closure: Callable[[], float] | None = None) -> float | None:
        # Once an SGD was built, torch has wrapped its `step` to run an optimizer's hooks: these
        # belong to our own step, and must not run inside it as well.
        step: Any = SGD.step
        if hasattr(step, "hooked"):
            step = step.__wrapped__
        loss: float | None = step(self, closure)
        return loss

    def _walk(self) -> None:
        counts, generators = self.param_groups[0], {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in generators:
                    key = ("langevin", counts["inner_steps"])
                    generators[device] = keyed_generator(self.seed, *key, device=device)
                self._walk_parameter(parameter, group["weight_decay"], generators[device])
        counts["walked"] += 1
        counts["inner_steps"] += 1

    def _walk_parameter(
        self, parameter: nn.Parameter, decay: float, generator: torch.Generator
    ) -> None:
        walk, gradient = self.state[parameter], parameter.grad
        if gradient is None:
            return
        if "centre" not in walk:
            walk["centre"], walk["mean"] = parameter.clone(), parameter.clone()
        direction: Tensor = gradient.add(parameter, alpha=decay)
        direction = direction.add(parameter - walk["centre"], alpha=self.pull)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.add_(direction, alpha=-self.langevin_lr)
        parameter.add_(noise.to(parameter), alpha=self.noise * math.sqrt(2 * self.langevin_lr))
        walk["mean"].lerp_(parameter, 1 - self.averaging)
