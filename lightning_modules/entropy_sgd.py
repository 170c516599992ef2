"""Entropy-SGD, an optimizer that looks for wide valleys, and the callback that ends its walks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.noise import keyed_generator


class EntropySGD(SGD):
    """SGD towards the mean of a short Langevin walk around the weights (Chaudhari et al., 2017).

    Each step of the walk takes a batch: w' ← w' - η'(g(w') + wd·w' + γ(w' - w)) + noise, and a
    running mean μ ← β μ + (1 - β) w' is kept. After L of them the outer step is one of torch's SGD,
    with momentum and weight decay, and w - μ as the gradient. So every batch counts, the closure
    runs once a step, and schedules (which change the outer `lr`), clipping, accumulation, AMP and
    DDP need nothing special. A pass over the data has 1/L as many outer steps: the 150 epochs of a
    run correspond to the paper's 150/L epochs of L batches a step.

    The walk has no momentum, as in the paper's code. With L = 0 it is torch's SGD bit for bit.
    Between outer steps the weights are those of the walk; `finish` ends it early. The modules of
    this package end it with the epoch and set the seed, see `EndOfWalk`.

    Args:
        params: Parameters or groups.
        lr: Outer learning rate.
        momentum: Of the outer step. The paper's code runs without, by mistake.
        nesterov: Whether it is Nesterov's.
        weight_decay: Of the walk and of the outer step.
        langevin_steps: Steps L of the walk; 1 in Table 1, swept over 1, 2, 3 and 5.
        langevin_lr: Rate η' of the walk.
        noise: Scale ε of the walk's noise, ε sqrt(2 η') N(0, 1) a step.
        gamma: Pull γ towards the outer weights.
        scoping: γ grows by the factor 1 + scoping with each outer step; the original's 1e-3 is
            without effect in the paper's code and would reach 1e21 in its 58,650 steps. The pull
            never goes further than back to the outer weights.
        averaging: β of the running mean.
        seed: Of the noise.

    Attributes:
        cut_short: Whether the next step ends the walk, whatever its length.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> weights = torch.nn.Parameter(torch.ones(1))
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
        check_number("langevin_lr", langevin_lr)
        check_number("noise", noise)
        check_number("gamma", gamma)
        check_number("scoping", scoping)
        super().__init__(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )
        self.langevin_steps, self.langevin_lr, self.noise = langevin_steps, langevin_lr, noise
        self.gamma, self.scoping, self.averaging, self.seed = gamma, scoping, averaging, seed
        self.cut_short = self._finishing = False
        # In a group, so that the optimizer's state dict has the counts.
        self.param_groups[0].update(walked=0, inner_steps=0, outer_steps=0)

    @property
    def walking(self) -> bool:
        """Whether the weights are those of a walk that has not ended."""
        return bool(self.param_groups[0]["walked"])

    @property
    def pull(self) -> float:
        """The current γ, at most 1/η', which is all the way back."""
        growth = self.param_groups[0]["outer_steps"] * math.log1p(self.scoping)
        gamma = self.gamma * math.exp(min(growth, 700.0))
        return min(gamma, 1 / self.langevin_lr) if self.langevin_lr else gamma

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step of the walk, and the outer step if the walk is complete.

        Args:
            closure: Evaluates the loss and its gradients.

        Returns:
            The closure's loss.
        """
        if self.langevin_steps == 0:
            return self._outer_step(closure)
        loss = None
        if not self._finishing:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._walk()
        complete = self.param_groups[0]["walked"] == self.langevin_steps
        if complete or self.cut_short or self._finishing:
            self._end_walk()
        return loss

    def finish(self) -> None:
        """Ends the walk with the outer step; without a walk nothing happens."""
        if not self.walking:
            return
        self._finishing = True
        try:
            # By `step`, so that its hooks, such as clipping, see the outer weights.
            self.step()
        finally:
            self._finishing = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of another `EntropySGD`, or of an SGD, whose walks begin at zero."""
        super().load_state_dict(state_dict)
        for name in ("walked", "inner_steps", "outer_steps"):
            self.param_groups[0].setdefault(name, 0)

    def _walk(self) -> None:
        counts = self.param_groups[0]
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device, state = parameter.device, self.state[parameter]
                if device not in generators:
                    key = ("langevin", counts["inner_steps"])
                    generators[device] = keyed_generator(self.seed, *key, device=device)
                if "centre" not in state:
                    state["centre"], state["mean"] = parameter.clone(), parameter.clone()
                direction: Tensor = parameter.grad.add(parameter, alpha=group["weight_decay"])
                direction = direction.add(parameter - state["centre"], alpha=self.pull)
                noise = torch.randn(parameter.shape, generator=generators[device], device=device)
                parameter.add_(direction, alpha=-self.langevin_lr)
                scale = self.noise * math.sqrt(2 * self.langevin_lr)
                parameter.add_(noise.to(parameter), alpha=scale)
                state["mean"].lerp_(parameter, 1 - self.averaging)
        counts["walked"] += 1
        counts["inner_steps"] += 1

    def _end_walk(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            state = self.state.get(parameter, {})
            parameter.grad = None
            if "centre" in state:
                parameter.copy_(state["centre"])
                parameter.grad = state.pop("centre") - state.pop("mean")
        self._outer_step()
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        self.param_groups[0]["walked"] = 0
        self.param_groups[0]["outer_steps"] += 1

    def _outer_step(self, closure: Callable[[], float] | None = None) -> float | None:
        # Once an SGD was built, torch has wrapped its `step` to run an optimizer's hooks: these
        # belong to our own step, and must not run inside it as well.
        step: Any = SGD.step
        if hasattr(step, "hooked"):
            step = step.__wrapped__
        loss: float | None = step(self, closure)
        return loss


class EndOfWalk(Callback):
    """Ends `EntropySGD`'s walk with the epoch and with training; leaves other optimizers alone.

    So measures, averages and checkpoints at the end of an epoch see outer weights. The last walk of
    an epoch may be shorter than the others. The noise of the walk gets the module's `run_seed`,
    which is the same on all processes.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the seed of the noise."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, EntropySGD):
                optimizer.seed = getattr(pl_module, "run_seed", None) or 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Has the last step of an epoch or of training end the walk, before hooks on the step."""
        if isinstance(optimizer, EntropySGD):
            last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
            optimizer.cut_short = last

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Ends the walk if a callback stops training, or if AMP skipped the last step."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, EntropySGD) and (optimizer.cut_short or trainer.should_stop):
                optimizer.finish()
