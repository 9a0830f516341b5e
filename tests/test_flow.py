"""Flow matching: the straight path, the training levels, and solvers that follow a known velocity field exactly.

`test_method.py` compares the solvers with diffusers' step by step.
"""

import pytest
import torch
from torch import Tensor

from unilip.errors import UniLIPError
from unilip.method.config import SOLVERS
from unilip.method.flow import flow_loss, guide, interpolate, logit_normal, make_schedule, sample, train_levels
from unilip.sampling import draw_noise

SHAPE = (2, 3, 4, 4)


def test_the_path_runs_straight_from_clean_to_noise_and_the_velocity_is_its_slope():
    clean, noise = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    for level, expected in ((0.0, clean), (1.0, noise), (0.25, 0.75 * clean + 0.25 * noise)):
        assert torch.allclose(interpolate(clean, noise, torch.full((2,), level)), expected)
    mixed = interpolate(clean, noise, torch.tensor([0.0, 1.0]))  # one level for each picture
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])
    low, high = (interpolate(clean, noise, torch.full((2,), s).double()) for s in (0.3, 0.7))
    assert flow_loss((high - low) / 0.4, clean, noise) < 1e-10


def test_the_loss_is_a_mean_in_float32():
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    assert flow_loss(noise - clean, clean, noise) == 0
    assert flow_loss(noise - clean + 2, clean, noise) == pytest.approx(4)
    clean, noise = torch.full(SHAPE, 300.0).half(), torch.full(SHAPE, -300.0).half()
    loss = flow_loss(torch.zeros(SHAPE).half(), clean, noise)  # 360000 does not fit in float16
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(360_000)


def test_training_levels_are_the_floor_of_1000_u():
    timesteps, levels = train_levels(torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9995, 1.0]))
    assert timesteps.tolist() == [1000, 1000, 999, 500, 1, 1]
    assert torch.allclose(levels, timesteps / 1000)
    every, _ = train_levels((torch.arange(1000) + 0.5) / 1000)
    assert every.tolist() == list(range(1000, 0, -1))  # the schedule of shift 1


def test_levels_are_drawn_from_a_logit_normal(generator):
    u = logit_normal(20_000, generator)
    assert 0 < u.min() < u.max() < 1
    logits = torch.logit(u.double())
    assert (logits.mean().item(), logits.std().item()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    assert torch.equal(u, logit_normal(20_000, generator.manual_seed(0)))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_the_published_schedule():
    schedule = make_schedule("dpm++", 3.0, 20)
    assert schedule.timesteps[:3].tolist() == [999, 982, 963]
    assert schedule.timesteps[-1] == 136
    assert schedule.timesteps.dtype == torch.long
    assert (schedule.levels[0], schedule.levels[-1]) == (pytest.approx(0.99967, abs=1e-5), 0)
    assert make_schedule("euler", 3.0, 2).timesteps.tolist() == [1000, 750]
    for solver in SOLVERS:  # a shift moves steps towards noise
        assert make_schedule(solver, 1.0, 11).timesteps[5] < 600 < make_schedule(solver, 3.0, 11).timesteps[5]
    with pytest.raises(UniLIPError, match=r"heun.*dpm\+\+, euler, unipc"):
        make_schedule("heun", 3.0, 20)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_field_is_followed_exactly(solver):
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for steps in (1, 2, 3, 20, 1000):  # close to 1000, steps share integer timesteps
        result = sample(lambda x, t: noise - clean, noise, make_schedule(solver, 3.0, steps))
        assert torch.allclose(result, clean, atol=3e-3)  # the published solver starts at level 0.9997, not at 1


def gaussian_error(solver: str, steps: int) -> float:
    """How far a solver ends from where the exact flow from noise to the distribution Normal(m, w^2) ends."""
    noise, m, w = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(1)), 2.0, 0.5
    schedule = make_schedule(solver, 3.0, steps)
    levels = iter(schedule.levels)

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        s = next(levels)
        mean = m + (1 - s) * w**2 / ((1 - s) ** 2 * w**2 + s**2) * (x - (1 - s) * m)  # of the clean value, given x
        return (x - mean) / s

    return (sample(velocity, noise, schedule) - (m + w * noise)).abs().max().item()


def test_a_gaussian_field_is_followed_ever_closer_and_by_two_solvers_in_second_order():
    for solver in SOLVERS:
        few, many = gaussian_error(solver, 10), gaussian_error(solver, 80)
        assert many < 0.1 and many < few / 3, solver
    assert max(gaussian_error("dpm++", 20), gaussian_error("unipc", 20)) < gaussian_error("euler", 20) / 2


def test_guidance_moves_away_from_the_unconditional_rows():
    low, high = torch.randn(SHAPE), torch.randn(SHAPE)
    assert torch.allclose(guide(torch.cat([low, high]), 2.5), low + 2.5 * (high - low))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_is_float32_and_steps_are_reported_and_can_be_replaced(solver):
    noise, target, seen = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16(), []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x.dtype)
        return target

    result = sample(velocity, noise, make_schedule(solver, 3.0, 20))
    assert {result.dtype, *seen} == {torch.float32}
    assert torch.allclose(result, noise.float() - target.float(), atol=3e-3)
    told: list[tuple[int, int]] = []

    def on_step(i: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        told.append((i, int(timestep)))
        return torch.full(SHAPE, 7.0).bfloat16() if i == 2 else None

    schedule = make_schedule(solver, 1.0, 3)
    result = sample(lambda x, t: torch.zeros_like(x), torch.zeros(SHAPE), schedule, on_step)
    assert told == list(enumerate(schedule.timesteps.tolist()))
    assert result.dtype == torch.float32
    assert (result == 7).all()


# --- noise ------------------------------------------------------------------------------------------------------------


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_does_not_depend_on_the_batch():
    batch = draw_noise(8, SHAPE[1:], seeded(*range(8)))
    assert batch.shape == (8, *SHAPE[1:])
    assert batch.dtype == torch.float32
    for i in range(8):
        assert torch.equal(batch[i], draw_noise(1, SHAPE[1:], seeded(i))[0])
    one = draw_noise(8, SHAPE[1:], seeded(3)[0])
    assert torch.equal(one[:2], draw_noise(2, SHAPE[1:], seeded(3)[0]))
    assert torch.equal(one[0], batch[3])
    assert abs(one.mean()) < 0.1 and abs(one.std() - 1) < 0.1
    assert len({tuple(picture.flatten().tolist()) for picture in one}) == 8


def test_a_generator_goes_on_from_call_to_call_and_without_one_the_global_one_does(generator):
    both = draw_noise(2, SHAPE[1:], seeded(0)[0])
    assert torch.equal(both, torch.cat([draw_noise(1, SHAPE[1:], generator) for _ in range(2)]))
    torch.manual_seed(5)
    first = draw_noise(1, SHAPE[1:], None)
    torch.manual_seed(5)
    assert torch.equal(first, draw_noise(1, SHAPE[1:], None))
    assert not torch.equal(first, draw_noise(1, SHAPE[1:], None))


def test_the_number_of_generators_must_match():
    for count in (0, 1, 3):
        with pytest.raises(UniLIPError, match=f"{count} generators were given for 2 pictures"):
            draw_noise(2, SHAPE[1:], seeded(*range(count)))
