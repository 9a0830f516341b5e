"""Objectives: what they compute, and that memory savers, precision and accumulation do not change it."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unilip.errors import CheckpointError, ConfigError
from unilip.fewstep import add_embedder, few_config
from unilip.method.config import TOKEN_PIXELS
from unilip.method.flow import flow_loss, interpolate, train_levels
from unilip.method.text import Tokens
from unilip.pictures import normalise
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.batches import to_device
from unilip.train.build import enable_checkpointing, make_batches, trained_parameters
from unilip.train.objectives import embed_texts, make_objective, needed_parts, to_unit, wide

KINDS = ["tiny/instruct", "tiny/recon_distill", "tiny/pretrain", "tiny/sft", "tiny/few"]
each_kind = pytest.mark.parametrize("name", KINDS)


def prepared(name, model, *settings, sources=None):
    """A recipe's objective and batches on a given model, frozen and trained parts marked."""
    if name == "tiny/sft":
        settings = ("data.edit_share=1", *settings)
    recipe = override(get_recipe(name), ["steps=50", *settings])
    if name == "tiny/few" and not model.config.dit.few_steps:
        add_embedder(model.dit)
        model.config = few_config(model.config, recipe.objective.counts)
    model.requires_grad_(False)
    for parameter, _ in trained_parameters(recipe, model).values():
        parameter.requires_grad_(True)
    return make_objective(recipe, model, sources or {}), make_batches(recipe, model.config, model.processor)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_products_are_kept_and_what_lies_between_is_not(fresh_model):
    """Each product of a block is computed once; sums, norms, gates and the depthwise convolution twice."""
    model = fresh_model(parts=needed_parts(get_recipe("tiny/sft").objective))
    objective, batches = prepared("tiny/sft", model)
    counts = {}
    for selective in (False, True):
        if selective:
            enable_checkpointing(model, selective=True)
        seen = counts[selective] = Counter()

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), named=None, seen=seen):
                seen[function.overloadpacket] += 1
                return function(*arguments, **(named or {}))

        with Count():
            loss, _ = objective.loss(batches[1], 0)
            loss.backward()
        model.zero_grad()
    aten = torch.ops.aten
    blocks = len(model.dit.transformer.transformer_blocks)
    for product in (aten.mm, aten.addmm, aten.bmm):
        assert counts[True][product] == counts[False][product]
    assert counts[True][aten.silu] > counts[False][aten.silu]
    assert counts[True][aten.convolution] == counts[False][aten.convolution] + blocks


# --- what is computed -------------------------------------------------------------------------------------------------


def test_flow_loss_is_the_formula(fresh_model):
    """Recomputed from the published parts: path, velocity, schedule; each noise under its sample's own condition."""
    model = fresh_model()
    objective, batches = prepared("tiny/sft", model, "objective.noises=3")
    batch = batches[0]
    loss, terms = objective.loss(batch, 0)
    assert list(terms) == ["flow_edit"]
    errors = []
    with torch.no_grad():
        for i, seed in enumerate(batch["seeds"]):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(3, 32, 2, 2, generator=generator)
            timesteps, sigmas = train_levels(torch.sigmoid(torch.randn(3, generator=generator)))
            source, target = (normalise(batch[k][i : i + 1] / 255) for k in ("sources", "targets"))
            clean = model.to_latent(model.encoder(target))
            tokens = batch["prompts"]
            one = Tokens(*(t[i : i + 1] for t in (tokens.input_ids, tokens.attention_mask, tokens.image_slots)))
            condition = model.condition(one, model.encoder(source))
            for k in range(3):
                noisy = interpolate(clean, noise[k : k + 1], sigmas[k : k + 1])
                velocity = model.dit(noisy, timesteps[k : k + 1], *condition)
                errors.append(flow_loss(velocity, clean, noise[k : k + 1]))
    torch.testing.assert_close(loss.detach(), torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def averages(model, objective, batch):
    """The tensors of `ahead`, one row at a time, as the published equations say."""
    settings, k = objective.settings, objective.settings.noises
    rows = []
    for i, seed in enumerate(batch["seeds"]):
        generator = torch.Generator().manual_seed(seed)
        noise, (u, v) = torch.randn(k, 32, 2, 2, generator=generator), torch.rand(2, k, generator=generator)
        clean = model.to_latent(model.encoder(normalise(batch["targets"][i : i + 1] / 255)))
        features = model.encoder(normalise(batch["sources"][i : i + 1] / 255)) if "sources" in batch else None
        scale = settings.guidance if features is None else settings.edit_guidance
        one, blank = (
            model.condition(Tokens(*(t[j : j + 1] for t in vars(batch[name]).values())), features)
            for name, j in (("prompts", i), ("blanks", i if features is not None else 0))
        )
        for j in range(k):
            s, r = ((1.0, 0.0), (u[j], u[j] * (1 - 0.05 * v[j])), (u[j], u[j] * v[j]))[(seed + j) % 3]
            s, r = torch.tensor([float(s)]), torch.tensor([float(r)])
            x = (1 - s) * clean + s * noise[j]
            told, free = (objective.teacher(x, 1000 * s, *given) for given in (one, blank))
            target, h = free + scale * (told - free), torch.minimum(s - r, torch.tensor(0.01))
            at, here, way = x - h * target, s - h, 0
            for place in (s - h + (r - s + h) / 2, r):
                step = (here - place) * model.dit(at, 1000 * here, *one, 1000 * place)
                at, way, here = at - step, way + step, place
            mean = model.dit(x, 1000 * s, *one, 1000 * r)
            off = (((s - r) * mean - way) / h - target).clamp(-1, 1)
            rows.append((off.square().mean(), torch.tan((1 - (s - r)) * torch.pi / 2.5) + 1))
    errors, weights = torch.stack([e for e, _ in rows]), torch.cat([w for _, w in rows])
    return (weights * errors / (errors + 1e-6).sqrt()).mean(), errors.mean()


@pytest.mark.parametrize("share", [0, 1])
def test_few_step_loss_is_the_formula(fresh_model, share):
    """Recomputed sample by sample; gradients are those of the weighted distance; at its goal nothing moves."""
    model = fresh_model()
    settings = (f"data.edit_share={share}", "objective.noises=3", "objective.edit_guidance=2", "batch_size=3")
    objective, batches = prepared("tiny/few", model, *settings)
    with torch.no_grad():
        for parameter in model.dit.parameters():  # as after some steps: another than the teacher
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = batches[0]
    expected, distance = averages(model, objective, batch)
    loss, terms = objective.loss(batch, 0)
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(terms["few_edit" if share else "few"], distance, rtol=2e-3, atol=1e-4)
    ahead = objective.ahead(batch, 0)
    again, _ = objective.loss(batch | ahead, 0)
    torch.testing.assert_close(again, loss)
    loss.backward()
    assert gradients(model)["dit.transformer.time_embed_2.linear.weight"].abs().sum() > 0
    assert not any(p.grad is not None for p in objective.teacher.parameters())
    s, r, h = ahead["levels"]
    assert bool((s > r).all()) and bool((r >= 0).all()) and float(h.max()) <= 0.01 + 1e-7
    kinds = {(seed + j) % 3 for seed in batch["seeds"] for j in range(3)}
    assert kinds == {0, 1, 2} and int(((s == 1) & (r == 0)).sum()) == 3


@pytest.mark.parametrize("joint", [0, 1])
def test_a_share_of_the_sources_is_drawn_by_the_model_first(fresh_model, joint):
    model = fresh_model()
    settings = ("data.edit_share=1", f"data.joint={joint}", "batch_size=3", "objective.redraw=0.5")
    objective, batches = prepared("tiny/shapes", model, *settings, "data.shapes=")
    batch = batches[0] | {"seeds": [1499, 1500, 4]}
    plain = model.features(normalise(batch["sources"] / 255))
    height = batch["sources"].shape[-2] // TOKEN_PIXELS
    again = model.features(normalise(model.from_latent(model.to_latent(plain, height)).clamp(0, 1)))
    each = 1 + joint
    found = objective.source_features(batch)
    for row in range(3 * each):
        torch.testing.assert_close(found[row], (plain if row // each == 1 else again)[row], atol=1e-5, rtol=1e-4)
    assert float((plain - again).abs().max()) > 1e-2
    few = override(get_recipe("tiny/sft"), ["objective.redraw=0"])
    assert "pixel_decoder" in needed_parts(objective.settings) and "pixel_decoder" not in needed_parts(few.objective)


def test_jumps_of_a_path_lead_to_its_states_from_them_or_from_where_the_model_is(fresh_model, monkeypatch):
    """A teacher of one velocity everywhere: jumps end on the straight way from the noise, most begin there."""
    objective, batches = prepared("tiny/few", fresh_model(), "objective.path=8", "objective.noises=2")
    assert not objective.looks_ahead
    constant = torch.randn(1, 32, 2, 2)
    monkeypatch.setattr(objective, "guided", lambda batch, x, *_: constant.expand_as(x))
    ahead = objective.ahead(batches[0], 0)
    (s, r, _), count = ahead["levels"], 2 * 2 * 8
    assert len(ahead["start"]) == len(s) == count and bool((s > r).all())
    near = dict(atol=3e-5, rtol=0)  # UniPC begins a millionth below 1
    down, target = wide(s - r), ahead["target"]
    noise = ahead["start"] - down * target + wide(1 - r) * constant
    ways = noise.reshape(4, 8, *noise.shape[1:])  # pictures x noises, jumps
    torch.testing.assert_close(ways, ways[:, :1].expand_as(ways), **near)
    assert float((ways[0, 0] - ways[1, 0]).abs().max()) > 0.1, "each noise has its own way"
    own = torch.tensor([float((target[i] - constant).abs().max()) > 1e-3 for i in range(count)])
    assert 3 <= int(own.sum()) <= count // 4 and bool((s[own] < 1).all())
    assert all(i % 16 % 3 == 2 for i in own.nonzero().flatten().tolist())
    row = next(i for i in own.nonzero().flatten().tolist() if float(s[i] - r[i]) > 0.6)  # the second jump of two
    with torch.no_grad():
        condition = (ahead["conditions"][row // 16, None], ahead["condition_mask"][row // 16, None])
        first = objective.jump(objective.model.dit, noise[row, None], torch.ones(1), s[row, None], condition)
    torch.testing.assert_close(ahead["start"][row], (noise[row] - (1 - s[row]) * first[0]), **near)
    even = torch.tensor([(1, 0), (1, 0.5), (0.5, 0), (1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)])
    wished, found = 2 * even / (1 + even), torch.stack([s, r], 1)  # of 4, 2 and 1 jumps, bent by a shift of 2
    assert int((torch.cdist(found, wished).amin(1) < 2e-3).sum()) >= count * 5 // 8
    with torch.no_grad():
        mean = objective.jump(objective.model.dit, ahead["start"], s, r, (ahead["conditions"], ahead["condition_mask"]))
        errors = (mean - ahead["target"]).square().flatten(1).mean(1)
        loss, terms = objective.loss(batches[0] | ahead, 0)
    assert float(loss) == pytest.approx(float(errors.sqrt().mean()), rel=1e-2), "each jump counts by its root"
    assert sum(float(term) for term in terms.values()) == pytest.approx(float(errors.mean()), rel=1e-4)


def test_what_is_held_alone_keeps_features_and_latents(fresh_model):
    """The anchor: latents of the stage's start, in parts of their variance; rows that are not held may move."""
    model = fresh_model(parts=needed_parts(get_recipe("tiny/recon_distill").objective))
    objective, batches = prepared("tiny/recon_distill", model, "objective.anchor=0.5", "objective.perceptual=0")
    batch = batches[0]
    assert objective.loss(batch, 0)[1]["anchor"].item() == 0
    rows = normalise(to_unit(batch["images"]))
    with torch.no_grad():
        before = model.latent_head(model.encoder(rows), rows.shape[-1] // TOKEN_PIXELS)
        for parameter in model.latent_head.parameters():
            parameter.add_(0.01)
        after = model.latent_head(model.encoder(rows), rows.shape[-1] // TOKEN_PIXELS)
    for held in (torch.tensor([True, False]), torch.tensor([False, False])):
        loss, terms = objective.loss(batch | {"held": held}, 0)
        wanted = (after - before)[held].square().mean() / before.var() if held.any() else torch.tensor(0.0)
        torch.testing.assert_close(terms["anchor"], wanted)
        torch.testing.assert_close(loss, terms["pixel"] + 0.1 * terms["distill"] + 0.5 * terms["anchor"])


def test_the_teacher_of_jumps_may_be_another_model(fresh_model, tmp_path):
    """A run that goes on from few-step weights names the model whose way they learn."""
    first, second = fresh_model(), fresh_model()
    with torch.no_grad():
        next(first.dit.parameters()).add_(1)
    first.save_pretrained(tmp_path / "first")
    objective, _ = prepared("tiny/few", second, sources={"teacher": str(tmp_path / "first")})
    kept, own, wanted = (m.state_dict() for m in (objective.teacher, second.dit, first.dit))
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted) and kept.keys() != own.keys()
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    with pytest.raises(ConfigError, match="of another size"):
        prepared("tiny/few", second, sources={"teacher": "embedded"})


@pytest.mark.parametrize("path", [0, 8])
def test_jumps_are_learned_from_the_teacher_alone(fresh_model, path):
    """A few hundred small steps on one batch: one jump comes near to where many guided steps lead."""
    model = fresh_model()
    settings = ("data.edit_share=0", "objective.noises=3", "objective.guidance=1", f"objective.path={path}")
    objective, batches = prepared("tiny/few", model, *settings)
    batch, wanted = batches[0], None
    batch |= {k: v for k, v in objective.ahead(batch, 0).items() if k in ("conditions", "condition_mask", "latents")}
    condition = (batch["conditions"], batch["condition_mask"])
    noise = torch.randn(2, 32, 2, 2)
    blank = model.condition(batch["blanks"])
    batch |= {"unconditional": blank[0].detach(), "unconditional_mask": blank[1]}
    with torch.no_grad():
        x = noise
        for i in range(200, 0, -1):
            x = x - objective.teacher(x, torch.full((2,), 5.0 * i), *condition) / 200
        wanted = x

        def apart():
            mean = objective.jump(model.dit, noise, torch.ones(2), torch.zeros(2), condition)
            return float((noise - mean - wanted).square().mean())

        before = apart()
    learning = [p for p in model.dit.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    for step in range(150):
        batch["seeds"] = [3 * step, 3 * step + 1]
        optimizer.zero_grad()
        objective.loss(batch, step)[0].backward()
        optimizer.step()
    with torch.no_grad():
        assert apart() < 0.5 * before, (apart(), before)


def test_reconstruction_terms(fresh_model):
    model = fresh_model(parts=needed_parts(get_recipe("tiny/recon").objective))
    objective, batches = prepared("tiny/recon_distill", model, "objective.pixel=2")
    batch = batches[0]
    loss, terms = objective.loss(batch, step=1)
    assert "gan" not in terms and objective.adversary_loss() is None, "before its start there is no GAN"
    target = batch["images"] / 255
    with torch.no_grad():
        output = (model.pixel_decoder(model.latent_head(model.encoder(normalise(target)))) + 1) / 2
    torch.testing.assert_close(terms["pixel"].detach(), F.mse_loss(output, target))
    torch.testing.assert_close(terms["psnr"], -10 * (output - target).square().mean((1, 2, 3)).log10().mean())
    torch.testing.assert_close(loss, 2 * terms["pixel"] + 0.1 * terms["perceptual"] + 0.1 * terms["distill"])
    late, more = objective.loss(batch, step=2)
    torch.testing.assert_close(late, loss + 0.1 * more["gan"])
    late.backward()
    assert all(p.grad is None for p in objective.adversary.parameters()), "the pictures fool it, it does not give in"
    second, _ = objective.adversary_loss()
    before = gradients(model)
    before = {name: grad.clone() for name, grad in before.items()}
    second.backward()
    assert all(p.grad is not None for p in objective.adversary.parameters())
    assert all(torch.equal(before[name], grad) for name, grad in gradients(model).items())
    assert all(p.requires_grad for p in objective.adversary.parameters())


def test_understanding_terms(fresh_model):
    model = fresh_model(parts=("encoder", "mllm"))
    objective, batches = prepared("tiny/instruct", model, "objective.contrastive=0.5", "objective.next_token=2")
    loss, terms = objective.loss(batches[0], 0)
    wanted = 0.5 * terms["contrastive"] + terms["words"] + 2 * terms["next_token"] + terms["bind"]
    wanted = wanted + 0.5 * (terms["grounding"] + terms["looking"])
    torch.testing.assert_close(loss, wanted)
    assert 0 <= terms["retrieval"] <= 1 and 0 <= terms["token_accuracy"] <= 1
    alone, batches = prepared(
        "tiny/instruct", model, "objective.contrastive=0", "objective.words=0", "objective.bind=0", "objective.ground=0"
    )
    _, terms = alone.loss(batches[0], 0)
    assert set(terms) == {"next_token", "token_accuracy"} and "captions" not in batches[0]


def test_a_text_is_embedded_by_its_last_token_whatever_the_padding(fresh_model):
    model = fresh_model(parts=("encoder", "mllm"))
    objective, _ = prepared("tiny/clip", model)
    short, long = "a cat<|im_end|>", "two red apples on the left<|im_end|>"
    both = embed_texts(model, objective.heads, model.processor.tokenize([short, long], padding_side="right"))
    alone = embed_texts(model, objective.heads, model.processor.tokenize([short]))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.01


def test_answers_are_learned_from_the_token_before(fresh_model):
    """The loss does not depend on a token that comes after the last learned one; it does on one before the first."""
    model = fresh_model(parts=("encoder", "mllm"))
    objective, batches = prepared("tiny/instruct", model, "batch_size=1", "data.text_share=0", "objective.turns=1")
    batch = batches[0]
    tokens, labels = batch["conversations"], batch["labels"]
    features = model.encoder(normalise(batch["images"] / 255))
    learned = (labels[0] >= 0).nonzero()[:, 0]

    def loss_with(position):
        ids = tokens.input_ids.clone()
        ids[0, position] = (ids[0, position] + 1) % 256
        return objective.answer_loss(
            objective.read(Tokens(ids, tokens.attention_mask, tokens.image_slots), features), labels
        )[0]

    exact = objective.answer_loss(objective.read(tokens, features), labels)[0]
    assert torch.equal(loss_with(learned[-1]), exact) and not torch.equal(loss_with(learned[0] - 1), exact)


def test_noise_and_data_of_a_sample_do_not_depend_on_the_batch(fresh_model):
    """Batch 4 = 2 x accumulate 2 for the flow objective: the same loss and the same gradients."""
    model = fresh_model()
    found = []
    for settings in (("batch_size=4",), ("batch_size=2", "accumulate=2")):
        objective, batches = prepared("tiny/pretrain", model, *settings)
        pieces = 2 if "accumulate=2" in settings else 1
        total = 0.0
        for i in range(pieces):
            loss, _ = objective.loss(batches[2 * pieces + i], 2)
            (loss / pieces).backward()
            total += loss.item() / pieces
        found.append((total, {name: grad.clone() for name, grad in gradients(model).items()}))
        model.zero_grad()
    (whole, a), (parts, b) = found
    assert whole == pytest.approx(parts, abs=1e-6) and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-4)


# --- memory and precision ---------------------------------------------------------------------------------------------


def one_layer_of_each(model) -> dict[str, nn.Module]:
    """A module inside a layer of each part."""
    layers = {
        "encoder": lambda: model.encoder.vision_tower.encoder.layer[0].mlp,
        "pixel_decoder": lambda: model.pixel_decoder.decoder.up_blocks[0][0].conv,
        "mllm": lambda: model.mllm.language_model.model.layers[0].mlp.gate_proj,
        "connector": lambda: model.connector.layers[0].mlp,
        "dit": lambda: model.dit.transformer.transformer_blocks[0].attn1.to_q,
    }
    return {part: layers[part]() for part in model.parts if part in layers}


@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
@each_kind
def test_gradient_checkpointing_recomputes_and_changes_nothing(name, selective, fresh_model):
    model = fresh_model(parts=needed_parts(get_recipe(name).objective))
    objective, batches = prepared(name, model)
    batch = batches[1]
    step = 3 if name == "tiny/recon_distill" else 0
    runs = {}
    for saving in (False, True):
        if saving:
            enable_checkpointing(model, selective)
        calls = dict.fromkeys(one_layer_of_each(model), 0)

        def counted(part, calls=calls):
            return lambda *_: calls.__setitem__(part, calls[part] + 1)

        hooks = [m.register_forward_pre_hook(counted(part)) for part, m in one_layer_of_each(model).items()]
        loss, _ = objective.loss(batch, step)
        forward = dict(calls)
        loss.backward()
        again = {part for part in calls if calls[part] > forward[part]}
        runs[saving] = loss.item(), {k: v.clone() for k, v in gradients(model).items()}, again
        model.zero_grad()
        for hook in hooks:
            hook.remove()
    (plain, a, none), (saved, b, recomputed) = runs[False], runs[True]
    assert plain == pytest.approx(saved, abs=1e-6) and a.keys() == b.keys() and a
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-4)
    assert not none
    needed = {"tiny/instruct": {"encoder", "mllm"}, "tiny/recon_distill": {"encoder", "pixel_decoder"}}
    needed["tiny/few"] = {"dit"}
    frozen_llm = {"mllm"} if selective else set()
    assert recomputed == needed.get(name, {"connector", "dit", *frozen_llm})


def test_train_mode_is_free_of_chance(tiny_model):
    """So checkpointing, which needs it, changes nothing, and evaluation mode while training loses nothing."""
    for module in tiny_model.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            assert module.p == 0


@each_kind
def test_bfloat16_autocast(name, fresh_model):
    model = fresh_model(parts=needed_parts(get_recipe(name).objective))
    objective, batches = prepared(name, model)
    step = 3 if name == "tiny/recon_distill" else 0
    exact, _ = objective.loss(batches[0], step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = objective.loss(batches[0], step)
    loss.backward()
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in terms.values())
    assert loss.item() == pytest.approx(exact.item(), rel=0.05) and loss.item() != exact.item()
    grads = gradients(model)
    assert grads and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads.values())
    second = objective.adversary_loss()
    assert second is None or second[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny/clip", "tiny/recon_distill", "tiny/pretrain", "tiny/sft"])
def test_everything_moves_to_the_device(name, fresh_model, dcae):
    """Nothing that a loss reads stays behind: tried with a device that holds no memory."""
    model = fresh_model()
    settings = ("objective.target=dcae",) if name == "tiny/pretrain" else ()
    objective, batches = prepared(name, model, *settings, sources={"autoencoder": str(dcae)})
    meta = torch.device("meta")
    model.to(meta)
    objective.to(meta)
    owned = [m for m in vars(objective).values() if isinstance(m, nn.Module) and m is not model]
    tensors = [t for module in owned for t in (*module.parameters(), *module.buffers())]
    assert all(t.is_meta for t in tensors) and (tensors or name == "tiny/sft")
    batch = to_device(batches[0], meta)
    assert all(t.is_meta for t in batch.values() if isinstance(t, torch.Tensor))
    if name != "tiny/clip":  # which reads values to choose rows
        model.mllm.forward = lambda embeddings, mask: embeddings  # likewise
        assert objective.loss(batch, 3)[0].is_meta


# --- other sources of weights -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dcae(tmp_path_factory):
    """A tiny diffusers AutoencoderDC in a folder, 32 px to a latent cell of 32 channels."""
    folder = tmp_path_factory.mktemp("dcae")
    widths = (8, 8, 8, 16, 16, 32)
    AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_dcae_latents_are_the_target_of_the_connector_stage(fresh_model, dcae):
    model = fresh_model(parts=("encoder", "mllm", "connector", "dit"))
    settings = ("objective.target=dcae", "trains=mllm.queries,connector")
    objective, batches = prepared("tiny/pretrain", model, *settings, sources={"autoencoder": str(dcae)})
    assert needed_parts(objective.settings) == ("encoder", "mllm", "connector", "dit"), "no latent head of our own"
    batch = batches[0]
    autoencoder = AutoencoderDC.from_pretrained(dcae)
    pixels = (
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).mul(255).byte()
    )  # as a folder has them
    with torch.no_grad():
        wanted = autoencoder.encode(pixels / 255 * 2 - 1).latent * 0.25
    torch.testing.assert_close(objective.clean_latents(pixels), wanted)
    assert objective.clean_latents(batch["targets"]).shape == (2, 32, 2, 2), "56 px become 64"
    loss, _ = objective.loss(batch, 0)
    loss.backward()
    assert {name.split(".")[0] for name in gradients(model)} == {"mllm", "connector"}
    assert gradients(model)["mllm.queries"].abs().sum() > 0
    assert not any(p.requires_grad for p in objective.autoencoder.parameters())
    assert objective.samples(batch)["drawn"].shape == (2, 2, 3, 64, 64)


def test_dcae_needs_an_autoencoder(fresh_model, tiny_folder, tmp_path):
    model = fresh_model(parts=("encoder", "mllm", "connector", "dit"))
    with pytest.raises(ConfigError, match="needs init autoencoder="):
        prepared("tiny/pretrain", model, "objective.target=dcae")
    for folder in (tiny_folder, tmp_path):
        with pytest.raises(CheckpointError, match="is not a diffusers AutoencoderDC"):
            prepared("tiny/pretrain", model, "objective.target=dcae", sources={"autoencoder": str(folder)})


def test_the_teacher_is_the_starting_encoder_unless_another_is_named(fresh_model, tiny_folder):
    model = fresh_model(seed=3, parts=("encoder", "latent_head", "pixel_decoder"))
    objective, batches = prepared("tiny/recon_distill", model)
    assert objective.loss(batches[0], 0)[1]["distill"].item() == 0
    with torch.no_grad():
        model.encoder.projector[1].weight.mul_(1.5)
    assert objective.loss(batches[0], 0)[1]["distill"].item() > 0, "the teacher stays where the stage began"
    named, _ = prepared("tiny/recon_distill", model, sources={"teacher": str(tiny_folder)})
    other = fresh_model(parts=("encoder",)).encoder.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in named.teacher.state_dict().items())
    assert named.loss(batches[0], 0)[1]["distill"].item() > 0
    for found in (objective, named):
        before = copy.deepcopy(found.teacher.state_dict())
        found.loss(batches[0], 0)[0].backward()
        assert not found.teacher.training and all(p.grad is None for p in found.teacher.parameters())
        assert all(torch.equal(before[key], value) for key, value in found.teacher.state_dict().items())


def test_heads_and_adversary_depend_on_the_seed_alone(fresh_model):
    model = fresh_model(parts=("encoder", "latent_head", "pixel_decoder", "mllm"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name, part in (("tiny/clip", "heads"), ("tiny/recon_distill", "adversary")):
        one, again, other = (prepared(name, model, f"seed={seed}")[0] for seed in (0, 0, 1))
        weights = [torch.cat([p.flatten() for p in getattr(o, part).parameters()]) for o in (one, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state), "and the caller's generator is left alone"


def test_sample_sheets(fresh_model):
    model = fresh_model()
    for name, sheet, rows in (
        ("tiny/recon", "reconstruction", 2),
        ("tiny/pretrain", "drawn", 2),
        ("tiny/sft", "drawn", 3),
    ):
        objective, batches = prepared(name, model)
        pictures = objective.samples(batches[0])[sheet]
        assert pictures.shape == (rows, 2, 3, 56, 56) and pictures.min() >= 0 and pictures.max() <= 1
        target = batches[0]["images" if name == "tiny/recon" else "targets"] / 255
        assert torch.equal(pictures[rows - 2], target), "what was wanted stands above what was made"
    assert prepared("tiny/clip", model)[0].samples({}) == {}


# --- the prompt is read once, without gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny/pretrain", "tiny/sft"])
def test_a_frozen_prompt_read_without_gradients_changes_nothing(name, fresh_model, monkeypatch):
    model = fresh_model()
    objective, batches = prepared(name, model)
    batch = batches[0]
    loss, _ = objective.loss(batch, 0)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()

    def whole(embeddings, mask):  # the plain way: one pass with gradients over everything
        sequence, mask = model.mllm.append_queries(embeddings, mask)
        return model.mllm(sequence, mask), mask

    monkeypatch.setattr(model.mllm, "read_with_queries", whole)
    plain, _ = objective.loss(batch, 0)
    plain.backward()
    torch.testing.assert_close(loss, plain)
    assert "mllm.queries" in ours
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-7)


def test_only_query_positions_keep_activations(fresh_model):
    model = fresh_model()
    objective, batches = prepared("tiny/sft", model)
    lengths = []
    layer = model.mllm.language_model.model.layers[0].mlp
    layer.register_forward_hook(lambda _, inputs, output: lengths.append((inputs[0].shape[1], output.requires_grad)))
    batch = batches[0]
    objective.loss(batch, 0)
    assert lengths == [(batch["prompts"].input_ids.shape[1], False), (model.config.num_queries, True)]
    lengths.clear()
    model.mllm.language_model.requires_grad_(True)  # one that learns needs the prompt's gradients too
    objective.loss(batch, 0)
    assert lengths == [(batch["prompts"].input_ids.shape[1] + model.config.num_queries, True)]


def test_words_of_questions_learn_where_what_they_name_lies(fresh_model):
    """The labels stand at the ends of the questions' words, and can be told there; and slots say what lies on them."""
    model = fresh_model(parts=("encoder", "mllm"))
    objective, batches = prepared("tiny/instruct", model, "objective.words=0", "objective.contrastive=0")
    batch = batches[0]
    rows, columns = batch["grounds"][:, :2].unbind(-1)
    known = model.processor.decode(batch["conversations"].input_ids[rows, columns][:, None])
    ends = {word for word in known if not word.isalpha()}
    assert {"?"} <= ends <= {"?", "."} and len(ends) < len(set(known)), known
    learning = [*model.mllm.parameters(), *objective.heads.parameters()]
    optimizer = torch.optim.Adam(learning, lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        total, terms = objective.loss(batch, 0)
        total.backward()
        optimizer.step()
    assert terms["slot_word"] == terms["own_word"] == 1 and terms["look"] > 0.9 and not objective.middle
    assert terms["ground"] == 1 and terms["ground_none"].nan_to_num(1) == 1, terms


@pytest.mark.parametrize("name", ["tiny/pretrain", "tiny/sft"])
def test_conditions_learn_what_words_say_and_what_is_to_lie_where(fresh_model, name):
    model = fresh_model(num_queries=4)
    objective, batches = prepared(name, model, "objective.bind=0.1", "objective.lesson_steps=1", "data.edit_share=0.5")
    batch = next(
        b for b in (batches[i] for i in range(9)) if ("sources" in b) == name.endswith("sft") and len(b["marks"])
    )
    alone, terms = objective.loss(batch, 0)
    assert alone == terms["lesson"] and not {"flow", "flow_edit"} & set(terms)
    total, terms = objective.loss(batch, 1)
    torch.testing.assert_close(total, terms.get("flow", terms.get("flow_edit")) + 0.1 * terms["lesson"])
    learning = [*model.connector.parameters(), model.mllm.queries, *objective.heads.parameters()]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        objective.loss(batch, 0)[0].backward()
        optimizer.step()
    terms = objective.loss(batch, 0)[1]
    assert terms["bind_concept"] == 1 and terms["cell_background"] > 0.9
    with pytest.raises(ConfigError, match="as many queries as image tokens"):
        prepared(name, fresh_model(), "objective.bind=0.1")


def test_states_come_to_resemble_features_of_the_clean_target_for_a_while(fresh_model):
    model = fresh_model()
    objective, batches = prepared("tiny/pretrain", model, "objective.repa=0.5", "steps=10", "objective.repa_until=0.5")
    total, terms = objective.loss(batches[0], 4)
    torch.testing.assert_close(total, terms["flow"] + 0.5 * terms["repa"])
    total.backward()
    assert gradients(model)["dit.transformer.patch_embed.proj.weight"].abs().sum() > 0
    assert not any(p.grad is not None for p in model.encoder.parameters())
    assert set(objective.loss(batches[0], 5)[1]) == {"flow"}
    with pytest.raises(ConfigError, match=r"repa needs objective.target=unilip"):
        prepared("tiny/pretrain", model, "objective.repa=0.5", "objective.target=dcae")
