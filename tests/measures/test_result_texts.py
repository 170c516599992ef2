import torch

from robust_flatness.functional.boundary import BoundaryThicknessResult
from robust_flatness.functional.flatness import FlatnessResult
from robust_flatness.functional.gradient_norm import FirstOrderFlatnessResult, GradientNormResult
from robust_flatness.functional.hessian import HessianResult, HessianTraceResult
from robust_flatness.functional.landscape import LandscapeResult, SurfaceResult
from robust_flatness.functional.robust_loss import RobustnessResult
from robust_flatness.functional.sharpness import SharpnessResult
from robust_flatness.functional.worst_case_flatness import WorstCaseFlatnessResult
from robust_flatness.measures.attack_checks import AttackChecksResult
from robust_flatness.measures.autoattack import Verdicts
from robust_flatness.measures.local_lipschitz import LocalLipschitzResult
from robust_flatness.measures.margins import MarginsResult
from robust_flatness.measures.single_step import SingleStepResult


def test_results_print_one_line_with_value_and_standard_error():
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    right, wrong = torch.tensor([True, True, True, False]), torch.tensor([False] * 3 + [True])
    perturbed = torch.stack([losses + 1, losses + 3])
    texts = {
        str(result)
        for result in (
            RobustnessResult(losses, right, losses, wrong),
            FlatnessResult(losses, perturbed),
            WorstCaseFlatnessResult(losses, perturbed),
            HessianResult(10.0, -1.0, {}, {}),
            LandscapeResult(torch.tensor([0.0, 1.0]), perturbed[None]),
            SurfaceResult(torch.tensor([0.0, 1.0]), torch.stack([perturbed, perturbed])),
            SingleStepResult(right, wrong, torch.ones(4)),
            Verdicts(wrong),
            SharpnessResult(losses, perturbed),
            SharpnessResult(losses, perturbed[:1]),
            HessianTraceResult(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3])),
            GradientNormResult(("w", "b"), torch.ones(2), torch.tensor([3.0, 4.0])),
            FirstOrderFlatnessResult(0.5, torch.tensor([1.0, 3.0, 2.0])),
            MarginsResult(losses, losses, losses - 3, losses),
            LocalLipschitzResult(losses, losses - 1),
            BoundaryThicknessResult(losses, right, wrong),
            AttackChecksResult(0.1, (0.05, 0.1), torch.stack([right, wrong]), wrong, wrong),
        )
    }
    # The standard errors by hand: sd of (1, 2, 3, 6) / 2, of one in four / 2, of (1, 3) / sqrt 2.
    assert texts == {
        "error 25.0 ± 25.0 %, RErr 75.0 ± 25.0 %, RLoss 3.000 ± 1.080 (4 examples)",
        "average-case flatness 2.000 ± 1.000 (2 directions), loss at w 3.000 ± 1.080",
        "worst-case flatness 3.000 ± 0.000 (worst of 2 restarts), loss at w 3.000 ± 1.080",
        "Hessian eigenvalues -1 to 10, convexity 0.1",
        "loss 4.000 to 6.000 at 2 steps from 0 to 1, mean of 1 directions",
        "loss 4.000 to 6.000 on a grid of 2 x 2 steps from 0 to 1",
        "error under FGSM 25.0 ± 25.0 %, under PGD 75.0 ± 25.0 %, gradient alignment "
        "1.000 ± 0.000 (4 examples)",
        "RErr (AutoAttack) 75.0 ± 25.0 % (4 examples)",
        "adaptive sharpness 2.000 ± 1.000 (2 draws), loss at w 3.000 ± 1.080",
        "adaptive sharpness 1.000, loss at w 3.000 ± 1.080",
        "Hessian trace 2 ± 1, scale-free 0.2 ± 0.1 (2 random vectors)",
        "gradient norm 5, relative to the weights 7",
        "first-order flatness 1.5 (radius 0.5, 2 steps)",
        "mean margin 3.000 ± 1.080, under PGD 0.000 ± 1.080 (4 examples)",
        "local Lipschitz constant 3.000 ± 1.080, KL under PGD 2.000 ± 1.080 (4 examples)",
        "boundary thickness 3.000 ± 1.080, target not reached 25.0 ± 25.0 % (4 examples)",
        "RErr at ε = 0.05 25.0 ± 25.0 %, at ε = 0.1 75.0 ± 25.0 %, with more steps "
        "75.0 ± 25.0 %, and Square 75.0 ± 25.0 % (4 examples)",
    }
    assert repr(Verdicts(wrong[:1])) == "RErr (AutoAttack) 100.0 % (1 examples)"
