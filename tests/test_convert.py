"""Checkpoints of every kind, written in their real formats, become ours tensor by tensor, and go back bit for bit."""

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from unilip.checkpoints.foreign import authors_configs
from unilip.checkpoints.infer import PARTS, expected_shapes, infer_config
from unilip.checkpoints.read import load_into, open_checkpoint
from unilip.checkpoints.tables import POINTWISE, map_names, unmap_names
from unilip.checkpoints.write import convert
from unilip.errors import CheckpointError
from unilip.info import describe
from unilip.method.config import UniLIPConfig
from unilip.model import UniLIP
from unilip.pictures import fit_square, load_image, to_pixels
from unilip.sizes import preset

PARITY = Path(__file__).parent / "parity"


def read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((PARITY / name).read_text())
    return data


def arguments(name: str) -> dict[str, Any]:
    return {k: v for k, v in read(name).items() if not k.startswith("_")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


# --- the released sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1b", "3b"])
def test_presets_have_the_released_names_and_shapes(size: str) -> None:
    released = {name: tuple(shape) for name, shape in read(f"unilip-{size}-keys.json").items()}
    ours = expected_shapes(preset(size), tuple(PARTS))
    back = unmap_names("authors", ours)
    ones = {name: (1, 1) if POINTWISE.fullmatch(name) else () for name in ours}
    shapes = {theirs: (ours[g[0]][0] * len(g), *ours[g[0]][1:], *ones[g[0]]) for theirs, g in back.items()}
    assert shapes == released
    origins, dropped = map_names("authors", released)
    assert set(origins) == set(ours)
    assert dropped == {}


@pytest.mark.parametrize("size", ["1b", "3b"])
@pytest.mark.parametrize("beside", [False, True])
def test_config_of_a_released_size_follows_from_its_own_config(size: str, beside: bool) -> None:
    files = authors_configs(preset(size))
    data = files.pop("config.json")
    shapes = expected_shapes(preset(size), tuple(PARTS))
    assert infer_config("authors", data, shapes, files if beside else {}) == preset(size)


@pytest.mark.parametrize(("size", "width"), [("1b", 896), ("3b", 1536)])
def test_config_of_a_released_tokenizer_follows_from_its_shapes(size: str, width: int) -> None:
    shapes = expected_shapes(preset(size), ("encoder", "latent_head", "pixel_decoder"))
    config = infer_config("tokenizer", {}, shapes, {})
    assert config == preset(size)
    assert config.text.hidden_size == width


@pytest.mark.parametrize("size", ["pico", "nano", "1b", "3b"])
def test_decoder_config_follows_from_shapes_alone(size: str) -> None:
    shapes = expected_shapes(preset(size), ("pixel_decoder",))
    first = preset(size).decoder.block_out_channels[0]
    data = {"_class_name": "AutoencoderDC", "scaling_factor": 0.41407, "decoder_block_out_channels": [first]}
    config = infer_config("dcae", data, shapes, {})
    assert expected_shapes(config, ("pixel_decoder",)) == shapes
    assert config.decoder.upsample_block_type == preset(size).decoder.upsample_block_type
    assert config.decoder.block_types == preset(size).decoder.block_types
    assert config.latent_factor == 0.41407


# --- the authors' format ----------------------------------------------------------------------------------------------


def test_authors_to_ours_and_back_is_bit_exact(tmp_path: Path) -> None:
    ours = convert(PARITY, tmp_path / "ours")
    back = convert(ours, tmp_path / "back", to="authors")
    same(load_file(back / "model.safetensors"), load_file(PARITY / "model.safetensors"))
    again = convert(back, tmp_path / "again")
    same(load_file(again / "model.safetensors"), load_file(ours / "model.safetensors"))
    assert open_checkpoint(back).kind == "authors"
    assert open_checkpoint(back).config.replace(name="") == open_checkpoint(PARITY).config.replace(name="")
    for name, value in read("config.json").items():
        written = json.loads((back / "config.json").read_text())
        if not isinstance(value, dict) and name != "transformers_version":
            assert written[name] == value


def test_sizes_and_samplers_go_there_and_back(tmp_path: Path, fresh_model: Callable[..., UniLIP]) -> None:
    sampling = {"num_inference_steps": 7, "guidance_scale": 1.0, "solver": "euler", "plan": "Describe.", "joint": True}
    config = preset("tiny").replace(image_size=112, sampling=sampling)
    fresh_model(image_size=112, sampling=config.sampling).save_pretrained(tmp_path / "ours")
    back = convert(convert(tmp_path / "ours", tmp_path / "theirs", to="authors"), tmp_path / "back")
    assert open_checkpoint(back).config.replace(name="tiny") == config
    data = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for wrong in ({"sampling": 5}, {"sampling": {"speed": 1}}, {"image_size": "112"}, {"image_size": 57}):
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(data | wrong))
        with pytest.raises(CheckpointError, match="makes no sense"):
            open_checkpoint(tmp_path / "theirs")


def test_fused_attention_is_split_and_stacked(tmp_path: Path) -> None:
    opened = open_checkpoint(PARITY)
    fused = load_file(PARITY / "model.safetensors")["model.vision_tower.encoder.layers.1.attn.qkv.weight"]
    parts = [opened.tensor(f"encoder.vision_tower.encoder.layer.1.attention.{x}_proj.weight") for x in "qkv"]
    assert torch.equal(torch.cat(parts), fused)


def test_a_missing_language_head_means_tied(tmp_path: Path) -> None:
    state = load_file(PARITY / "model.safetensors")
    head = state.pop("lm_head.weight")
    folder = authors_folder(tmp_path / "tied", state)
    opened = open_checkpoint(folder)
    assert opened.config.text.tie_embeddings
    model = UniLIP.from_pretrained(folder)
    assert model.mllm.language_model.lm_head.weight is model.mllm.language_model.model.embed_tokens.weight
    back = convert(convert(folder, tmp_path / "ours"), tmp_path / "back", to="authors")
    same(load_file(back / "model.safetensors"), state)
    assert describe(folder)["language_head"] == "tied to the token embedding"

    stored = {**state, "lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()}
    folder = authors_folder(tmp_path / "both", stored, tie_word_embeddings=True)
    assert open_checkpoint(folder).dropped == {"lm_head.weight": "tied: the same numbers as the token embedding"}
    folder = authors_folder(tmp_path / "untied", stored)
    assert describe(folder)["language_head"] == "stored, equal to the token embedding"
    folder = authors_folder(tmp_path / "differs", {**state, "lm_head.weight": head}, tie_word_embeddings=True)
    assert not open_checkpoint(folder).config.text.tie_embeddings
    assert "differs" in open_checkpoint(folder).notes[0]


def authors_folder(folder: Path, state: dict[str, torch.Tensor], drop: tuple[str, ...] = (), **changes: Any) -> Path:
    folder.mkdir(parents=True)
    for name in ("dit_config.json", "vae_config.json", "scheduler_config.json"):
        if name not in drop:
            shutil.copyfile(PARITY / name, folder / name)
    data = {k: v for k, v in (read("config.json") | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(data))
    save_file(state, folder / "model.safetensors")
    return folder


def test_what_shapes_cannot_decide_is_asked_for(tmp_path: Path) -> None:
    state = load_file(PARITY / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dit_config\.json"):
        open_checkpoint(authors_folder(tmp_path / "a", state, drop=("dit_config.json",)))
    with pytest.raises(CheckpointError, match="unilip_factor"):
        open_checkpoint(authors_folder(tmp_path / "b", state, unilip_factor=None))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        open_checkpoint(authors_folder(tmp_path / "c", state, text_config={"hidden_size": 64}))
    opened = open_checkpoint(authors_folder(tmp_path / "d", state, drop=("vae_config.json", "scheduler_config.json")))
    assert opened.config.replace(name="") == open_checkpoint(PARITY).config.replace(name="")


def test_position_embedding_is_on_whatever_the_authors_config_says() -> None:
    assert read("dit_config.json")["interpolation_scale"] is None
    assert open_checkpoint(PARITY).config.dit.interpolation_scale == 1.0
    assert describe(PARITY)["position_embedding"].startswith("on, scale 1")


def test_names_and_shapes_are_strict_in_both_directions(tmp_path: Path) -> None:
    state = load_file(PARITY / "model.safetensors")
    extra = {**state, "model.ghost.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 tensor \(model\.ghost\.weight\) is not known"):
        open_checkpoint(authors_folder(tmp_path / "extra", extra))
    fewer = {k: v for k, v in state.items() if "latent_queries" not in k and "layers.1.mlp" not in k}
    with pytest.raises(CheckpointError, match=r"\d+ tensors \(.*\.\.\.\) are missing"):
        open_checkpoint(authors_folder(tmp_path / "fewer", fewer))
    other = {**state, "model.projector.bias": torch.zeros(47)}
    with pytest.raises(CheckpointError, match=r"connector\.to_dit\.bias \[47\] instead of \[48\]"):
        open_checkpoint(authors_folder(tmp_path / "other", other))
    odd = {**state, "model.dit.transformer_blocks.7.ghost": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="unexpected"):
        open_checkpoint(authors_folder(tmp_path / "odd", odd))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_mean": (0.1,) * 32}, "one factor"),
        ({"latent_factor": (2.0,) * 32}, "one factor"),
        ({"dit": {"interpolation_scale": None}}, "position embedding"),
        ({"dit": {"plain_blocks": True}}, "SANA's blocks"),
    ],
)
def test_what_the_authors_format_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    config = preset("tiny")
    if "dit" in changes:
        data = config.to_dict()
        data["dit"] |= changes["dit"]
        config = UniLIPConfig.from_dict(data)
        assert UniLIPConfig.from_dict(config.to_dict()) == config
    else:
        config = config.replace(**changes)
    with pytest.raises(CheckpointError, match=message):
        authors_configs(config)


def test_only_whole_models_go_back(tmp_path: Path, fresh_model: Callable[..., UniLIP]) -> None:
    fresh_model(parts=("encoder",)).save_pretrained(tmp_path / "part")
    with pytest.raises(CheckpointError, match="whole models only"):
        convert(tmp_path / "part", tmp_path / "back", to="authors")
    with pytest.raises(CheckpointError, match="unilip, authors, transformers, diffusers"):
        convert(tmp_path / "part", tmp_path / "back", to="gguf")
    assert not (tmp_path / "back").exists()


# --- the other kinds, in their real formats ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dcae() -> AutoencoderDC:
    torch.manual_seed(1)
    return AutoencoderDC(**arguments("vae_config.json"))


def test_first_generation_stage(tmp_path: Path, dcae: AutoencoderDC) -> None:
    state = {k: v for k, v in load_file(PARITY / "model.safetensors").items() if "vae_decoder" not in k}
    state |= {f"model.dcae.{k}": v for k, v in dcae.state_dict().items()}
    for model_type in ("unilip_vae_internvl", "unilip_internvl"):
        folder = authors_folder(tmp_path / model_type, state, model_type=model_type)
        opened = open_checkpoint(folder)
        assert opened.kind == "authors-stage1"
        assert opened.parts == ("encoder", "pixel_decoder", "mllm", "connector", "dit")
        assert opened.config.latent_factor == 0.41407  # DC-AE's own, not UniLIP's
        assert opened.config.dit.interpolation_scale == 1.0
        assert all(name.startswith("model.dcae.encoder.") for name in opened.dropped)
        assert len(opened.dropped) == len(dcae.encoder.state_dict())
    model = UniLIP.from_pretrained(folder)
    latent = torch.randn(1, 32, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.pixel_decoder.decode(latent), dcae.decode(latent).sample, atol=1e-5, rtol=1e-5)


def test_tokenizer_file(tmp_path: Path, fresh_model: Callable[..., UniLIP]) -> None:
    state = {}
    for name, value in load_file(PARITY / "model.safetensors").items():
        for theirs, own in (("vision_tower", "encoder."), ("multi_modal_projector", "mlp1."), ("vae_decoder", "")):
            if name.startswith(f"model.{theirs}."):
                state[own + name.removeprefix(f"model.{theirs}.")] = value
    path = tmp_path / "1b_unilip.pth"
    torch.save({**state, "regressor.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"heads of a vision encoder 32 wide.*config\.json"):
        open_checkpoint(path)
    shutil.copyfile(convert(PARITY, tmp_path / "ours") / "config.json", tmp_path / "config.json")
    opened = open_checkpoint(path)
    assert opened.kind == "tokenizer"
    assert opened.parts == ("encoder", "latent_head", "pixel_decoder")
    assert list(opened.dropped) == ["regressor.weight"]
    ours = load_file(convert(path, tmp_path / "tokenizer") / "model.safetensors")
    whole = load_file(tmp_path / "ours" / "model.safetensors")
    same(ours, {k: v for k, v in whole.items() if k.split(".")[0] in opened.parts})
    back = unmap_names("tokenizer", ours)
    same({t: torch.cat([ours[n] for n in g]) if len(g) > 1 else ours[g[0]] for t, g in back.items()}, state)
    again = open_checkpoint(tmp_path / "tokenizer")
    assert again.kind == "unilip"
    assert again.parts == opened.parts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["as saved", "model.", "bare"])
def test_internvl(tmp_path: Path, tied: bool, prefix: str) -> None:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    torch.manual_seed(2)
    parity = read("config.json")
    text = {k: v for k, v in parity["text_config"].items() if k not in ("rope_scaling", "rope_theta")}
    text |= {"tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = InternVLConfig(
        text_config=text, vision_config=parity["vision_config"], image_token_id=290, tie_word_embeddings=tied
    )
    theirs = InternVLForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    if prefix != "as saved":  # the names of other versions of transformers
        state = load_file(tmp_path / "model.safetensors")
        renamed = {}
        for name, value in state.items():
            name = name.replace("language_model.lm_head.", "lm_head.").replace(
                "language_model.model.", "language_model."
            )
            renamed[name if prefix == "bare" or name.startswith("lm_head") else prefix + name] = value
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, opened.parts, opened.absent) == ("internvl", ("encoder", "mllm"), ("mllm.queries",))
    assert opened.config.text.tie_embeddings is tied
    assert opened.config.text.rope_theta == 1e6
    assert opened.image_token_id == 290
    with torch.device("meta"):
        model = UniLIP(opened.config, parts=opened.parts)
    assert load_into(model, opened) == ("mllm.queries",)
    assert 0.01 < model.mllm.queries.std() < 0.03  # drawn anew, the same each time
    assert torch.equal(model.mllm.queries, UniLIP.from_pretrained(tmp_path).mllm.queries)
    pixels, ids = torch.randn(1, 3, 56, 56), torch.tensor([[1, 290, 290, 290, 290, 2]])
    with torch.no_grad():
        features = model.encoder(pixels)
        embeddings = model.mllm.embed(ids, ids == 290, features)
        logits = model.mllm.logits(model.mllm(embeddings, torch.ones_like(ids)))
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert convert(tmp_path, tmp_path / "ours").is_dir()
    assert open_checkpoint(tmp_path / "ours").metadata["created"] == "mllm.queries"


def test_dcae(tmp_path: Path, dcae: AutoencoderDC) -> None:
    dcae.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert (opened.kind, opened.parts) == ("dcae", ("pixel_decoder",))
    assert opened.config.latent_factor == 0.41407
    assert len(opened.dropped) == len(dcae.encoder.state_dict())
    model = UniLIP.from_pretrained(tmp_path)
    latent = torch.randn(1, 32, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.pixel_decoder.decode(latent), dcae.decode(latent).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pipeline", [True, False])
def test_sana(tmp_path: Path, pipeline: bool) -> None:
    torch.manual_seed(3)
    theirs = SanaTransformer2DModel(**arguments("dit_config.json")).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    if pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    opened = open_checkpoint(tmp_path if pipeline else tmp_path / "transformer")
    assert (opened.kind, opened.parts) == ("sana", ("dit",))
    assert opened.config.dit.interpolation_scale is None  # plain SANA was made without
    assert describe(opened.path)["position_embedding"].startswith("off")
    model = UniLIP.from_pretrained(opened.path)
    noise, condition, mask = torch.randn(2, 32, 16, 16), torch.randn(2, 5, 48), torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    steps = torch.tensor([500, 20])
    with torch.no_grad():
        out = model.dit(noise, steps, condition, mask)
        expected = theirs(noise, condition, steps, encoder_attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    state = load_file(convert(opened.path, tmp_path / "ours") / "model.safetensors")
    original = dict(theirs.state_dict())
    same({n: state[f"dit.transformer.{n}"].reshape(v.shape) for n, v in original.items()}, original)
    assert len(state) == len(original)


def test_parts_of_several_sources_meet_in_one_model(tmp_path: Path, dcae: AutoencoderDC) -> None:
    dcae.save_pretrained(tmp_path / "dcae")
    whole, decoder = open_checkpoint(PARITY), open_checkpoint(tmp_path / "dcae")
    with torch.device("meta"):
        model = UniLIP(whole.config)
    load_into(model, whole, parts=[part for part in PARTS if part != "pixel_decoder"])
    assert next(model.pixel_decoder.parameters()).is_meta
    load_into(model, decoder, parts=["pixel_decoder"])
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model.pixel_decoder.decoder.conv_in.weight, dcae.decoder.conv_in.weight)
    with pytest.raises(CheckpointError, match="has no dit"):
        load_into(model, decoder, parts=["dit"])


# --- as InternVL ------------------------------------------------------------------------------------------------------


@pytest.mark.hosts
def test_transformers_answers_from_an_export_as_we_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    examples = Path(str(resources.files("unilip"))) / "weights" / "examples"
    model, folder = UniLIP.from_pretrained(), convert(None, tmp_path / "internvl", to="transformers")
    theirs, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.eos_token_id
        == theirs.generation_config.eos_token_id
        == open_checkpoint().tokenizer.token_id("<|im_end|>")
    )
    config, differing = open_checkpoint().config, []
    for file in ("panda.png", "donuts.png", "dog-rocket.png"):
        image = load_image(examples / file)
        for question in ("What is in the picture?", "Describe the image.", "How many animals are there?"):
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            text = text.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * config.num_image_tokens}</img>")
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            pixels = to_pixels([fit_square(image, config.image_size)])
            made = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=48)[0, ids.shape[1] :]
            answer = tokenizer.decode(made, skip_special_tokens=True).strip()
            if answer != model.ask(image, question, max_new_tokens=48):
                differing.append((file, question, answer))
    assert differing == []


def test_a_picture_of_any_size_is_one_square_for_transformers(tmp_path: Path, tiny_folder: Path) -> None:
    """InternVL's processor asks for tiles on its own, whatever the file of settings says."""
    pil = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    folder, side = (
        convert(tiny_folder, tmp_path / "internvl", to="transformers"),
        open_checkpoint(tiny_folder).config.image_size,
    )
    processor = pil.GotOcr2ImageProcessorPil.from_pretrained(folder)
    image = load_image(Path(str(resources.files("unilip"))) / "weights" / "examples" / "panda.png").resize((640, 480))
    read = processor(image, crop_to_patches=True, return_tensors="pt")
    assert read["num_patches"].tolist() == [1]
    torch.testing.assert_close(read["pixel_values"], to_pixels([fit_square(image, side)]), atol=1e-5, rtol=0)
    assert len(processor(image, crop_to_patches=True, max_patches=12)["pixel_values"]) == 13


def test_what_cannot_be_internvl_is_refused(
    tmp_path: Path, fresh_model: Callable[..., UniLIP], tiny_folder: Path
) -> None:
    fresh_model(parts=("encoder",)).save_pretrained(tmp_path / "part")
    bare = shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    for source, message in ((tmp_path / "part", "has no mllm"), (bare, "no tokenizer with <IMG_CONTEXT>")):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


# --- as a pipeline of diffusers ---------------------------------------------------------------------------------------


@pytest.mark.hosts
def test_diffusers_draws_and_edits_from_an_export_as_we_do(tmp_path: Path, tiny_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    differing = []
    for source, size in ((tiny_folder, "1MB"), (None, "5GB")):
        folder = convert(source, tmp_path / f"pipeline-{size}", to="diffusers", max_shard_size=size)
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(folder)
        pipe, model = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), UniLIP.from_pretrained(source)
        assert isinstance(pipe, DiffusionPipeline) and set(pipe.components) == {"model", "tokenizer"}
        settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
        picture = torch.rand(3, 40, 60)
        for seed in (0, 7):
            drawn = pipe("three yellow stars", generator=torch.Generator().manual_seed(seed), **settings).images
            edited = pipe("make it pink", image=picture, generator=torch.Generator().manual_seed(seed), **settings)
            ours = model.generate("three yellow stars", generator=seed, **settings).images
            changed = model.edit(picture, "make it pink", generator=seed, **settings).images
            if not torch.equal(drawn, ours) or not torch.equal(edited.images, changed):
                differing.append((source, seed))
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert pipe.dtype == torch.bfloat16 and pipe.to(torch.float32) is pipe and pipe.dtype == torch.float32
        same(dict(UniLIP.from_pretrained(folder).state_dict()), dict(model.state_dict()))  # and it is a model of ours
        assert describe(folder)["parameters"] == describe(source)["parameters"]
    assert differing == []


def test_a_pipeline_folder_replaces_another_whole_or_not_at_all(
    tmp_path: Path, tiny_folder: Path, fresh_model: Callable[..., UniLIP]
) -> None:
    folder = convert(tiny_folder, tmp_path / "pipeline", to="diffusers")
    (folder / "notes.txt").write_text("mine")
    (folder / "model" / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    convert(tiny_folder, folder, to="diffusers")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "README.md", "model/config.json", "model/model.safetensors", "model/network.py", "model_index.json",
        "notes.txt", "pipeline.py", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/words.py",
    ]  # fmt: skip
    convert(tiny_folder, folder)
    assert (folder / "config.json").is_file() and not (folder / "model").exists() and (folder / "notes.txt").is_file()
    fresh_model(parts=("encoder",)).save_pretrained(tmp_path / "part")
    bare = shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    for source, lacking in ((tmp_path / "part", "pixel_decoder, mllm, connector, dit"), (bare, "tokenizer")):
        with pytest.raises(CheckpointError, match=f"There is no {lacking}, which a pipeline needs"):
            convert(source, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()
