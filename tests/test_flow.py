"""Flow matching: the straight path, the training levels, and solvers that follow a known velocity field exactly."""

import pytest
import torch
from torch import Tensor

from unilip.errors import UniLIPError
from unilip.method.flow import (
    SOLVERS,
    denoise,
    flow_loss,
    interpolate,
    logit_normal,
    make_scheduler,
    train_levels,
    train_schedule,
    velocity_target,
)
from unilip.sampling import draw_noise

SHAPE = (2, 3, 4, 4)


def test_the_path_runs_straight_from_clean_to_noise():
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for sigma, expected in ((0.0, clean), (1.0, noise), (0.25, 0.75 * clean + 0.25 * noise)):
        assert torch.allclose(interpolate(clean, noise, torch.full((2,), sigma)), expected)
    mixed = interpolate(clean, noise, torch.tensor([0.0, 1.0]))  # one level for each picture
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])


def test_the_target_is_the_slope_of_the_path():
    clean, noise = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    low, high = (interpolate(clean, noise, torch.full((2,), s).double()) for s in (0.3, 0.7))
    assert torch.allclose((high - low) / 0.4, velocity_target(clean, noise))


def test_the_loss():
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    assert flow_loss(noise - clean, clean, noise) == 0
    assert flow_loss(noise - clean + 2, clean, noise) == pytest.approx(4)


def test_the_loss_is_computed_in_float32():
    clean, noise = torch.full(SHAPE, 300.0).half(), torch.full(SHAPE, -300.0).half()
    loss = flow_loss(torch.zeros(SHAPE).half(), clean, noise)  # 360000 does not fit in float16
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(360_000)


def test_the_training_schedule():
    timesteps, sigmas = train_schedule()
    assert len(timesteps) == len(sigmas) == 1000
    assert (timesteps[0], timesteps[-1]) == (1000, 1)
    assert (sigmas[0].item(), sigmas[-1].item()) == (1, pytest.approx(0.001))
    assert (timesteps.diff() < 0).all()
    assert torch.allclose(sigmas, timesteps / 1000)  # shift 1


def test_training_levels_are_the_floor_of_1000_u():
    timesteps, sigmas = train_levels(torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9995, 1.0]))
    assert timesteps.tolist() == [1000, 1000, 999, 500, 1, 1]
    assert torch.allclose(sigmas, timesteps / 1000)


def test_levels_are_drawn_from_a_logit_normal(generator):
    u = logit_normal(20_000, generator)
    assert 0 < u.min() < u.max() < 1
    logits = torch.logit(u.double())
    assert (logits.mean().item(), logits.std().item()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    assert torch.equal(u, logit_normal(20_000, generator.manual_seed(0)))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_the_published_schedule():
    scheduler = make_scheduler("dpm++", 3.0)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[:3].tolist() == [999, 982, 963]
    assert scheduler.timesteps[-1] == 136
    assert (scheduler.sigmas[0].item(), scheduler.sigmas[-1].item()) == (pytest.approx(0.99967, abs=1e-5), 0)
    settings = scheduler.config
    assert (settings.algorithm_type, settings.solver_type, settings.solver_order) == ("dpmsolver++", "midpoint", 2)
    assert (settings.lower_order_final, settings.final_sigmas_type) == (True, "zero")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shift_moves_steps_towards_noise(solver):
    def middle(shift: float) -> float:
        visited: list[float] = []
        denoise(
            lambda x, t: visited.append(float(t[0])) or torch.zeros_like(x),
            torch.zeros(SHAPE), make_scheduler(solver, shift), 11, 1.0,
        )  # fmt: skip
        return visited[5]

    assert middle(1.0) < 600 < middle(3.0)


def test_an_unknown_solver_lists_the_known_ones():
    with pytest.raises(UniLIPError, match=r"heun.*dpm\+\+, euler, unipc"):
        make_scheduler("heun", 3.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 1000])  # close to 1000, steps share integer timesteps
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_field_is_followed_exactly(solver, steps):
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    result = denoise(lambda x, t: noise - clean, noise, make_scheduler(solver, 3.0), steps, 1.0)
    assert torch.allclose(result, clean, atol=3e-3)  # the published solver starts at level 0.9997, not at 1


def gaussian_error(solver: str, steps: int) -> float:
    """How far a solver ends from where the exact flow from noise to the distribution Normal(m, w^2) ends."""
    noise, m, w = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(1)), 2.0, 0.5
    scheduler = make_scheduler(solver, 3.0)
    step = iter(range(steps))

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        s = float(scheduler.sigmas[next(step)])
        mean = m + (1 - s) * w**2 / ((1 - s) ** 2 * w**2 + s**2) * (x - (1 - s) * m)  # of the clean value, given x
        return (x - mean) / s

    return (denoise(velocity, noise, scheduler, steps, 1.0) - (m + w * noise)).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gaussian_field_is_followed_ever_closer(solver):
    few, many = gaussian_error(solver, 10), gaussian_error(solver, 80)
    assert many < 0.1
    assert many < few / 3


def test_the_multistep_solvers_are_of_second_order():
    assert max(gaussian_error("dpm++", 20), gaussian_error("unipc", 20)) < gaussian_error("euler", 20) / 2


def test_two_steps_of_euler_meet_in_the_middle():
    visited = []
    denoise(lambda x, t: visited.append(int(t[0])) or x, torch.zeros(SHAPE), make_scheduler("euler", 3.0), 2, 1.0)
    assert visited == [1000, 750]


def test_guidance_moves_away_from_the_unconditional_rows():
    noise, low, high, asked = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        asked.append((tuple(x.shape), timestep.dtype, tuple(timestep.shape)))
        assert torch.equal(x[:2], x[2:])
        return torch.cat([low, high])  # unconditional first

    result = denoise(velocity, noise, make_scheduler("euler", 3.0), 4, 2.5)
    assert torch.allclose(result, noise - (low + 2.5 * (high - low)), atol=1e-5)
    assert asked == [((4, 3, 4, 4), torch.long, (4,))] * 4


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_no_guidance_asks_once(guidance):
    rows = []
    denoise(lambda x, t: rows.append(len(x)) or x, torch.zeros(SHAPE), make_scheduler("dpm++", 3.0), 3, guidance)
    assert rows == [2, 2, 2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_stays_float32(solver):
    noise, target = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16()
    seen = []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x.dtype)
        return target

    result = denoise(velocity, noise, make_scheduler(solver, 3.0), 20, 1.0)
    assert {result.dtype, *seen} == {torch.float32}
    assert torch.allclose(result, noise.float() - target.float(), atol=3e-3)


def test_steps_are_reported_and_can_be_replaced():
    seen = []

    def on_step(i: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        seen.append((i, int(timestep)))
        return torch.full(SHAPE, 7.0).bfloat16() if i == 2 else None

    result = denoise(
        lambda x, t: torch.zeros_like(x), torch.zeros(SHAPE), make_scheduler("euler", 1.0), 3, 1.0, on_step
    )
    assert seen == [(0, 1000), (1, 666), (2, 333)]
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


def test_a_generator_goes_on_from_call_to_call(generator):
    both = draw_noise(2, SHAPE[1:], seeded(0)[0])
    assert torch.equal(both, torch.cat([draw_noise(1, SHAPE[1:], generator) for _ in range(2)]))


def test_noise_without_a_generator_follows_the_global_one():
    torch.manual_seed(5)
    first = draw_noise(1, SHAPE[1:], None)
    torch.manual_seed(5)
    assert torch.equal(first, draw_noise(1, SHAPE[1:], None))
    assert not torch.equal(first, draw_noise(1, SHAPE[1:], None))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_number_of_generators_must_match(count):
    with pytest.raises(UniLIPError, match=f"{count} generators were given for 2 pictures"):
        draw_noise(2, SHAPE[1:], seeded(*range(count)))
