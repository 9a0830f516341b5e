"""Losses against hand computation, and what they do: tell pictures apart, see equals as equal, hold features."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unilip.errors import ConfigError
from unilip.pictures import normalise
from unilip.recipes.record import Recipe, Reconstruct
from unilip.train.losses import (
    LECAM_DECAY,
    BlurDown,
    LPIPSConvNeXt,
    PatchDiscriminator,
    TeacherPerceptual,
    contrastive_loss,
    discriminator_loss,
    lecam_penalty,
)
from unilip.train.objectives import make_objective

TOKENIZER = ("encoder", "latent_head", "pixel_decoder")


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3) / 2)
    assert float(discriminator_loss(real + 9, fake - 9)) == 0


def test_lecam_by_hand():
    real, fake, means = torch.tensor([1.0, -1.0]), torch.tensor([0.5, -3.0]), torch.tensor([0.25, -0.5])
    # real above the drawn pictures' mean: 1.5, 0; drawn below the real ones' mean: 0, 3.25
    assert float(lecam_penalty(real, fake, means)) == pytest.approx((1.5**2 + 0) / 2 + (0 + 3.25**2) / 2)


def test_the_adversary_remembers_mean_scores():
    adversary = PatchDiscriminator(width=8)
    adversary.remember(torch.tensor([1.0, 3.0]), torch.tensor([-4.0]))
    step = 1 - LECAM_DECAY
    torch.testing.assert_close(adversary.means, torch.tensor([2 * step, -4 * step]))
    assert "means" in adversary.state_dict(), "a resumed run goes on from them"


def test_blur_halves_and_keeps_a_plain_picture():
    x = torch.full((2, 3, 16, 16), 0.7)
    y = BlurDown()(x)
    assert y.shape == (2, 3, 8, 8)
    torch.testing.assert_close(y, torch.full_like(y, 0.7))
    stripes = torch.arange(16).remainder(2).float().expand(1, 1, 16, 16)  # the finest there are: what would alias
    torch.testing.assert_close(BlurDown()(stripes)[..., 1:-1], torch.full((1, 1, 8, 6), 0.5))


def test_the_discriminator_learns_to_tell_pictures_apart(generator):
    torch.manual_seed(1)
    adversary = PatchDiscriminator(width=8)
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=3e-3)

    def draw():
        smooth = F.interpolate(torch.rand(8, 3, 4, 4, generator=generator), size=(32, 32), mode="bilinear")
        return smooth * 2 - 1, smooth * 2 - 1 + 0.3 * torch.randn(8, 3, 32, 32, generator=generator)

    assert adversary(draw()[0]).shape == (8, 1, 4, 4)
    for _ in range(25):
        loss = discriminator_loss(*(adversary(x) for x in draw()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (adversary(x) for x in draw())
    assert real.mean() > 0.5 and fake.mean() < -0.5 and (real > fake).float().mean() > 0.95


def test_contrast_by_hand():
    image, text = (F.normalize(torch.tensor(rows), dim=-1) for rows in ([[1.0, 0], [0, 1]], [[1.0, 0], [1, 1]]))
    loss, right = contrastive_loss(image, text, torch.eye(2), torch.tensor(2.0))
    scores = [[2.0, math.sqrt(2)], [0.0, math.sqrt(2)]]

    def entropy(row, answer):
        return math.log(sum(math.exp(v) for v in row)) - row[answer]

    rows = entropy(scores[0], 0) + entropy(scores[1], 1)
    columns = entropy([scores[0][0], scores[1][0]], 0) + entropy([scores[0][1], scores[1][1]], 1)
    assert float(loss) == pytest.approx((rows / 2 + columns / 2) / 2)
    assert float(right) == 1


def test_captions_that_say_the_same_share_the_answer():
    """Two pictures of which one caption holds: neither is the wrong answer to it, however the texts are embedded."""
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    text = torch.tensor([[1.0, 0, 0], [0.8, 0, 0.6], [0, 0, 1]])
    image = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    loss, right = contrastive_loss(image, text, same, torch.tensor(5.0))
    scores = (image @ text.T * 5).tolist()

    def entropy(row, target):
        total = math.log(sum(math.exp(v) for v in row))
        return sum(t * (total - v) for v, t in zip(row, target, strict=True))

    targets = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    columns = [list(column) for column in zip(*scores, strict=True)]
    expected = sum(entropy(r, t) for rows in (scores, columns) for r, t in zip(rows, targets, strict=True)) / 6
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    alone, _ = contrastive_loss(image, text, torch.eye(3), torch.tensor(5.0))
    assert float(alone) != pytest.approx(expected, rel=1e-2)
    assert float(right) == 1, "either of two equal captions is a right answer"
    _, found = contrastive_loss(image, text[[2, 2, 0]], same, torch.tensor(5.0))
    assert found == 0


def test_contrast_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 64), dim=-1) for _ in range(2))
    exact = contrastive_loss(image, text, torch.eye(4), torch.tensor(99.0))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, torch.eye(4), torch.tensor(99.0))[0], exact)


def test_perceptual_is_zero_for_equals_and_moves_the_output_alone(fresh_model, generator):
    teacher = fresh_model(parts=("encoder",)).encoder.requires_grad_(False)
    perceptual = TeacherPerceptual(teacher)
    target = torch.rand(2, 3, 56, 56, generator=generator)
    assert float(perceptual(target.clone(), target)) == 0
    output = (target + 0.1 * torch.randn(target.shape, generator=generator)).requires_grad_()
    wanted = target.clone().requires_grad_()
    distance = perceptual(output, wanted)
    distance.backward()
    assert distance > 0 and output.grad.abs().sum() > 0 and wanted.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    far = perceptual(target + 0.5 * torch.randn(target.shape, generator=generator), target)
    assert far > distance.detach()
    assert not list(perceptual.parameters()), "the teacher belongs to the objective"


def test_lpips_that_is_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"needs the package lpips .*install it, or use teacher"):
        LPIPSConvNeXt()


def reconstruction(model, **weights):
    recipe = Recipe(
        name="x/y", model="tiny", objective=Reconstruct(**weights), trains=tuple((part, 1.0) for part in TOKENIZER),
        steps=15, batch_size=4,
    )  # fmt: skip
    return make_objective(recipe, model, {})


def test_distillation_starts_at_zero_and_holds_the_features(fresh_model, picture):
    """The paper's claim in fifteen steps: the picture comes, and without distillation the features go."""
    images = torch.from_numpy(np.stack([np.asarray(picture(seed=i)) for i in range(4)])).movedim(-1, 1)
    start = fresh_model(parts=TOKENIZER)
    original = copy.deepcopy(start.encoder)
    drift, pixel = {}, {0.0: [], 1.0: []}
    for weight in (0.0, 1.0):
        model = copy.deepcopy(start)
        objective = reconstruction(model, perceptual=0.0, distill=weight)
        if weight:
            assert objective.loss({"images": images}, 0)[1]["distill"].item() == 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(15):
            loss, terms = objective.loss({"images": images}, step)
            pixel[weight].append(terms["pixel"].item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pixels = normalise(images / 255)
        with torch.no_grad():
            drift[weight] = float(F.mse_loss(model.encoder(pixels), original(pixels)))
    assert drift[1.0] < 0.5 * drift[0.0], drift
    assert all(losses[-1] < 0.6 * losses[0] for losses in pixel.values()), pixel
