"""The attacks of the AutoAttack package in fewer and larger batches, with equal verdicts.

The package attacks one target class after the other, goes on with images that it has broken, and
queries Square one step at a time. Here an attack leaves out what cannot change a verdict, and runs
together what does not depend on each other. All that is computed for an image is computed as the
package does, from the same random numbers; only the other images in its batch differ.
"""

import math
from typing import Any

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from robust_flatness.functional.evaluation import Model


def use_larger_batches(attack: AutoAttack, batch_size: int) -> None:
    """Exchanges the attacks of an `AutoAttack` for those of this module.

    Args:
        attack: Its network must treat each image on its own and the same each time.
        batch_size: Number of images in a batch, at most, unless the package itself has more.
    """
    classes = {
        "apgd": _APGD,
        "apgd_targeted": _TargetedAPGD,
        "fab": _FAB,
        "square": _Square,
    }
    for name, own in classes.items():
        # The version has set their attributes already.
        getattr(attack, name).__class__ = own
        getattr(attack, name).batch_size = batch_size


class _OpenRows:
    """The network for one run of APGD, which is not called for images that the run has broken.

    Their logits are those of a correct prediction without gradient, with which APGD keeps the
    adversarial example that it has.

    Args:
        network: Maps images to logits.
        labels: True classes `(N,)`.
        order: Place of each image's target among targets attacked together `(N,)`. With an image of
            one target all images of later targets are closed, as the package would attack fewer of
            them, from other random numbers.
    """

    def __init__(self, network: Model, labels: Tensor, order: Tensor) -> None:
        self.network, self.labels, self.order = network, labels, order
        self.rows = torch.arange(len(labels), device=labels.device)

    def __call__(self, images: Tensor) -> Tensor:
        if not len(self.rows):
            return self._correct(images) + 0 * images.flatten(1).sum(1, keepdim=True)
        is_whole = len(self.rows) == len(images)
        logits = self.network(images if is_whole else images[self.rows])
        self.num_classes = logits.shape[1]
        full = logits if is_whole else self._correct(images).index_copy(0, self.rows, logits)
        wrong = logits.detach().max(1)[1] != self.labels[self.rows]
        if wrong.any():
            order = self.order[self.rows]
            self.rows = self.rows[~wrong & (order <= order[wrong].min())]
        return full

    def _correct(self, images: Tensor) -> Tensor:
        return functional.one_hot(self.labels, self.num_classes).to(images.dtype)


class _APGD(APGDAttack):
    model: Any
    order: Tensor | None = None

    @override
    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if self.eot_iter != 1:
            return super().attack_single_run(x, y, x_init)
        network, order = self.model, torch.zeros_like(y) if self.order is None else self.order
        self.model = _OpenRows(network, y, order)
        try:
            return super().attack_single_run(x, y, x_init)
        finally:
            self.model = network


class _TargetedAPGD(_APGD, APGDAttack_targeted):
    batch_size: int

    @override
    def perturb(self, x: Tensor, y: Tensor) -> Any:
        self.init_hyperparam(x)
        adversarial, logits = x.clone(), self.model(x)
        classes, is_robust = logits.sort(dim=1)[1], logits.max(1)[1] == y
        torch.manual_seed(self.seed)
        target = 0
        while target < self.n_target_classes and is_robust.any():
            rows = is_robust.nonzero()[:, 0]
            images = x[rows]
            together = max(1, self.batch_size // len(rows))
            together = min(together, self.n_target_classes - target)
            starts, states = [], []
            for _ in range(together):
                linf = self.norm == "Linf"
                noise = 2 * torch.rand(images.shape) - 1 if linf else torch.randn(images.shape)
                starts.append(images + self.eps * self.normalize(noise.to(x.device)))
                states.append(torch.get_rng_state())
            self.order = torch.arange(together, device=x.device).repeat_interleave(len(rows))
            self.y_target = torch.cat([classes[rows, -2 - target - i] for i in range(together)])
            repeated = images.repeat(together, 1, 1, 1), y[rows].repeat(together)
            _, correct, _, found = self.attack_single_run(*repeated, torch.cat(starts))
            broken = correct.view(together, -1) == 0
            # Of later targets nothing is known: the package attacks fewer images there.
            last = broken.any(1).nonzero()
            last = int(last[0]) if len(last) else together - 1
            torch.set_rng_state(states[last])
            hit = rows[broken[last]]
            adversarial[hit] = found.view(together, *images.shape)[last][broken[last]]
            is_robust[hit] = False
            target += last + 1
        return adversarial


class _FAB(FABAttack_PT):
    batch_size: int
    n_iter: int
    _open: Tensor | None

    @override
    def perturb(self, x: Tensor, y: Tensor) -> Any:
        # Without targets it has random starts.
        if not self.targeted or self.n_restarts != 1:
            return super().perturb(x, y)
        adversarial = x.clone()
        with torch.no_grad():
            logits = self.predict(x)
        classes, is_robust = logits.sort(dim=1)[1], logits.max(1)[1] == y
        iterations, target = self.n_iter, 0
        while target < self.n_target_classes and is_robust.any():
            rows = is_robust.nonzero()[:, 0]
            together = max(1, self.batch_size // len(rows))
            together = min(together, self.n_target_classes - target)
            self._images = x[rows].repeat(together, 1, 1, 1)
            self._labels, self._index = y[rows].repeat(together), rows.repeat(together)
            self._targets = torch.cat([classes[rows, -2 - target - i] for i in range(together)])
            self._open, self._clean = None, logits[rows].repeat(together, 1)
            self._broken = torch.zeros_like(self._labels, dtype=torch.bool)
            self.target_class = 1  # not used
            try:
                found = self.attack_single_run(self._images, self._labels, is_targeted=True)
            finally:
                self.n_iter = iterations
            hit = self._index[self._broken]
            adversarial[hit] = found[self._broken]
            is_robust[hit] = False
            target += together
        return adversarial

    @override
    def _predict_fn(self, x: Tensor) -> Any:
        return self._clean if self.targeted and self.n_restarts == 1 else super()._predict_fn(x)

    @override
    def _get_predicted_label(self, x: Tensor) -> Any:
        if not (self.targeted and self.n_restarts == 1):
            return super()._get_predicted_label(x)
        if self._open is None:
            self._open = torch.arange(len(x), device=x.device)
            return self._labels
        rows, predicted = self._open, self._labels.clone()
        predicted[rows] = self.predict(x[rows]).max(1)[1]
        difference = (x - self._images).flatten(1)
        if self.norm == "Linf":
            distance = difference.abs().max(1)[0]
        else:
            distance = (difference**2).sum(-1).sqrt()
        broken = (predicted != self._labels) & (distance <= self.eps)
        if broken.any():
            self._broken |= broken
            self._open = rows[~torch.isin(self._index[rows], self._index[broken])]
            if not len(self._open):
                self.n_iter = 0
        return predicted

    @override
    def get_diff_logits_grads_batch_targeted(
        self, imgs: Tensor, la: Tensor, la_target: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = self._open
        gap, gradient = imgs.new_ones(len(imgs), 1), torch.ones_like(imgs).unsqueeze(1)
        gap[rows], gradient[rows] = super().get_diff_logits_grads_batch_targeted(
            imgs[rows], la[rows], self._targets[rows]
        )
        return gap, gradient


class _Square(SquareAttack):
    batch_size: int

    @override
    def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
        # With l2, random numbers depend on which images are left.
        if self.norm != "Linf":
            return super().attack_single_run(x, y)
        with torch.no_grad():
            count, channels, height, width = x.shape
            noise = self.random_choice([count, channels, 1, width])
            best = torch.clamp(x + self.eps * noise, 0.0, 1.0)
            margins = self.margin_and_loss(best, y)[0].tolist()
            squares, signs = self._proposals(channels, height, width)
            kinds: dict[Any, int] = {}
            kind = [kinds.setdefault((*a, *b), len(kinds)) for a, b in zip(squares, signs.tolist())]
            signs, corners = signs.to(x.device), torch.tensor(squares, device=x.device)
            places = [torch.arange(size, device=x.device) for size in (height, width)]
            place = [0] * count
            rejected: list[set[int]] = [set() for _ in range(count)]
            while True:
                left = [k for k in range(count) if margins[k] > 0 and place[k] < self.n_queries]
                if not left:
                    break
                share = max(1, self.batch_size // len(left))
                images, queries = [], []
                for k in left:
                    new = 0
                    # A proposal that was rejected is so again until another one is accepted.
                    wanted = min(share, 1 + len(rejected[k]))
                    while place[k] < self.n_queries and new < wanted:
                        if kind[place[k]] not in rejected[k]:
                            rejected[k].add(kind[place[k]])
                            images.append(k)
                            queries.append(place[k])
                            new += 1
                        place[k] += 1
                if not images:
                    continue
                index, query = torch.tensor([images, queries], device=x.device)
                size, top, start = corners[query].T[..., None]
                tall = (places[0] >= top) & (places[0] < top + size)
                wide = (places[1] >= start) & (places[1] < start + size)
                area = (tall[:, None, :, None] & wide[:, None, None, :]).to(x.dtype)
                current, clean = best[index], x[index]
                moved = current + 2.0 * self.eps * signs[query, :, None, None] * area
                moved = torch.min(torch.max(moved, clean - self.eps), clean + self.eps)
                moved = torch.clamp(moved, 0.0, 1.0)
                changed = (moved != current).flatten(1).any(1).nonzero()[:, 0]
                if not len(changed):
                    continue
                margin = self.margin_and_loss(moved[changed], y[index[changed]])[0].tolist()
                done = set()
                for row, value in zip(changed.tolist(), margin):
                    k = images[row]
                    if k not in done and value < margins[k]:
                        done.add(k)
                        margins[k], place[k] = value, queries[row] + 1
                        rejected[k].clear()
                        best[k] = moved[row]
            return torch.tensor(place), best

    def _proposals(
        self, channels: int, height: int, width: int
    ) -> tuple[list[tuple[int, int, int]], Tensor]:
        squares, signs = [], []
        for query in range(self.n_queries):
            share = self.p_selection(query) * (channels * height * width) / channels
            side = min(max(round(math.sqrt(share)), 1), height, width)
            top, start = (int((size - side) * torch.rand(1)) for size in (height, width))
            squares.append((side, top, start))
            signs.append(torch.sign(2 * torch.rand(channels) - 1))
        return squares, torch.stack(signs)
