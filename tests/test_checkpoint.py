"""Checkpoints on disk: loading is exact and complete, saving is whole or nothing, and bad files say what is wrong."""

import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unilip.checkpoints import hub, write
from unilip.checkpoints.hub import needed_files, push_to_hub, resolve
from unilip.checkpoints.read import Weights, load_into, open_checkpoint, parse_dtype
from unilip.checkpoints.write import parse_size, save
from unilip.errors import CheckpointError, UniLIPError
from unilip.info import describe
from unilip.model import PARTS, UniLIP
from unilip.sizes import preset


def on_meta(config: Any, parts: tuple[str, ...] = tuple(PARTS)) -> UniLIP:
    with torch.device("meta"):
        return UniLIP(config, parts=parts)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = tensors(a), tensors(b)
    assert sorted(left) == sorted(right)
    assert [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])] == []


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_loaded_model_equals_the_saved_one(tiny_model: UniLIP, tiny_folder: Path) -> None:
    loaded = UniLIP.from_pretrained(tiny_folder)
    assert_same(loaded, tiny_model)
    assert loaded.processor is not None
    assert not any(t.is_meta for t in tensors(loaded).values())


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path, fresh_model: Callable[..., UniLIP]) -> None:
    config = preset("tiny")
    model = fresh_model(text=type(config.text)(**{**vars(config.text), "tie_embeddings": True}))
    model.save_pretrained(tmp_path / "m")
    assert "mllm.language_model.lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    loaded = UniLIP.from_pretrained(tmp_path / "m")
    llm = loaded.mllm.language_model
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert_same(loaded, model)


def test_dtype_device_and_trainability(tiny_folder: Path) -> None:
    opened = open_checkpoint(tiny_folder)
    model = on_meta(opened.config)
    model.encoder.requires_grad_(False)
    assert load_into(model, opened, dtype="bfloat16", device="cpu") == ()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.dit.parameters())


def test_stored_precision_is_kept_only_when_asked(tmp_path: Path, tiny_model: UniLIP) -> None:
    tiny_model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert UniLIP.from_pretrained(tmp_path / "half").dtype == torch.float32
    assert describe(tmp_path / "half")["dtype"] == "float16"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has", [True, False])
def test_auto_keeps_what_is_measured_faster(
    stored: torch.dtype, has: bool, tmp_path: Path, tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"float32": 1.0, "bfloat16": 0.5 if has else 0.99, "float16": 0.5 if has else 2.0}
    monkeypatch.setattr("unilip.fast.products.product_times", lambda *_: times)
    tiny_model.save_pretrained(tmp_path / "stored", dtype=stored)
    for low_memory in (False, True):
        model = UniLIP.from_pretrained(tmp_path / "stored", dtype="auto", low_memory=low_memory)
        drawn = model.generate("a red star", num_inference_steps=1, output_type="pt", progress=False).images
        assert drawn.isfinite().all()
        if not low_memory:
            assert model.dtype == (stored if has else torch.float32)


def test_every_tensor_is_read_once_and_copied(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    opened = open_checkpoint(folder)
    read: list[str] = []
    original = opened.tensor
    monkeypatch.setattr(opened, "tensor", lambda name: (read.append(name), original(name))[1])
    model = on_meta(opened.config)
    load_into(model, opened)
    assert sorted(read) == sorted(opened.names)
    weight = model.encoder.projector[1].weight
    before = weight.clone()
    os.truncate(folder / "model.safetensors", 100)  # the model does not depend on its file any more
    assert torch.equal(weight, before)


def test_parts(tiny_folder: Path) -> None:
    model = UniLIP.from_pretrained(tiny_folder, parts=("encoder", "latent_head"))
    assert model.parts == ("encoder", "latent_head")
    opened = open_checkpoint(tiny_folder)
    other = on_meta(opened.config)
    load_into(other, opened, parts=["encoder"])
    assert next(other.dit.parameters()).is_meta


def test_a_model_of_another_shape_is_refused(tiny_folder: Path) -> None:
    opened = open_checkpoint(tiny_folder)
    with pytest.raises(CheckpointError, match=r"mllm\.queries \[1, 8, 64\] instead of \[1, 9, 64\]"):
        load_into(on_meta(opened.config.replace(num_queries=9)), opened)
    with pytest.raises(CheckpointError, match="missing"):
        load_into(on_meta(opened.config.replace(connector_layers=3)), opened)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_into(on_meta(opened.config.replace(connector_layers=1)), opened)


def test_dtypes_by_name() -> None:
    assert parse_dtype(None) == torch.float32
    assert parse_dtype("bfloat16") == torch.bfloat16
    assert parse_dtype("auto") is None
    for wrong in ("int8", "float99", "nn", torch.int64, "float8_e5m2", torch.float8_e4m3fn):
        with pytest.raises(CheckpointError, match="allowed: float32"):
            parse_dtype(wrong)


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        open_checkpoint("nobody/nothing")

    def unknown(*args: object, **options: object) -> None:
        raise OSError("Repository Not Found")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", unknown)
    with pytest.raises(CheckpointError, match="Repository Not Found"):  # not that nothing of it lies on this machine
        open_checkpoint("nobody/nothing")
    with pytest.raises(CheckpointError, match="There is no checkpoint at ~nobody-of-that-name"):
        open_checkpoint("~nobody-of-that-name")
    with pytest.raises(CheckpointError, match="name too long"):
        describe("a" * 5000)


def test_truncated_weights(broken: Path) -> None:
    for size in (0, 5, 1000, 500_000):
        os.truncate(broken / "model.safetensors", size)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            open_checkpoint(broken)


def test_a_git_lfs_pointer(broken: Path) -> None:
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull` there\.$"):
        open_checkpoint(broken)


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json.*InternVL3.*SANA"):
        open_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ("{}", "alone does not tell"),
        ('{"model_type": "llama"}', "'llama'.*Understood are"),
        ('{"model_type": "internvl_chat"}', "ends in -hf"),
        ('{"format": "unilip"}', "no weights"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no weights file"):
        open_checkpoint(config)
    config.unlink()
    torch.save({"encoder.x": torch.zeros(1)}, tmp_path / "1b_unilip.pth")
    with pytest.raises(CheckpointError, match=r"1b_unilip\.pth: give that file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="alone does not tell what it is"):
        open_checkpoint(tmp_path / "1b_unilip.pth")


def test_config_that_makes_no_sense(broken: Path) -> None:
    data = json.loads((broken / "config.json").read_text())
    for change, message in (
        ({"image_size": 57}, "multiple of 28"),
        ({"colour": "blue"}, "unknown fields colour"),
        ({"num_queries": 9}, "of another shape"),
        ({"connector_layers": 3}, "missing"),
    ):
        (broken / "config.json").write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(broken)


class Trap:
    """What a malicious pickle looks like: loading it would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": torch.zeros(1), "trap": Trap()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth holds more than tensors.*could run code; it was refused"):
        open_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("stored", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_weights_that_are_no_numbers_to_compute_with_are_refused(stored: torch.dtype, broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    for name in ("model.safetensors", "pytorch_model.bin"):
        state["mllm.queries"] = torch.ones_like(state["mllm.queries"]).to(stored)
        (save_file if name.endswith("safetensors") else torch.save)(state, broken / name)
        if not (name.endswith("bin") and stored.is_floating_point):  # the one type there that has a wider range
            with pytest.raises(CheckpointError, match=r"holds mllm\.queries in .*; convert it to BF16"):
                open_checkpoint(broken)
        (broken / name).unlink()


def test_a_head_of_another_type_differs_from_the_embedding(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    state["mllm.language_model.lm_head.weight"] = state["mllm.language_model.lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(state, broken / "model.safetensors")
    assert describe(broken)["language_head"] == "stored, differs from the token embedding"


def test_bad_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"mlp1.0.weight": torch.randn(1000)}, path)
    os.truncate(path, 900)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(path)


def test_a_file_that_was_replaced_is_not_read_by_its_old_index(tiny_model: UniLIP, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "m")
    opened, low = open_checkpoint(tmp_path / "m"), UniLIP.from_pretrained(tmp_path / "m", low_memory=True)
    low.generate("a star", num_inference_steps=1, progress=False)
    tiny_model.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="replaced after it had been opened"):
        opened.tensor("mllm.queries")
    with pytest.raises(CheckpointError, match="load the model again"):
        low.generate("a star", num_inference_steps=1, progress=False)


def test_torch_weights_that_were_replaced_are_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    weights = load_file(tiny_folder / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path)
    assert torch.equal(opened.tensor("mllm.queries"), weights["mllm.queries"])
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin was replaced after it had been opened"):
        opened.tensor("mllm.queries")


def test_torch_weights_old_and_new_load_like_safetensors(tiny_folder: Path, tiny_model: UniLIP, tmp_path: Path) -> None:
    for zipped in (True, False):
        folder = tmp_path / str(zipped)
        folder.mkdir()
        shutil.copyfile(tiny_folder / "config.json", folder / "config.json")
        torch.save(
            load_file(tiny_folder / "model.safetensors"),
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
        assert_same(UniLIP.from_pretrained(folder), tiny_model)


def test_a_single_file_beside_its_config(tiny_folder: Path, tiny_model: UniLIP) -> None:
    assert_same(UniLIP.from_pretrained(tiny_folder / "model.safetensors"), tiny_model)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_shards_load_like_one_file_and_are_checked(tmp_path: Path, tiny_model: UniLIP) -> None:
    tiny_model.save_pretrained(tmp_path / "m", max_shard_size="1MB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 1.1e6 for shard in shards)
    assert_same(UniLIP.from_pretrained(tmp_path / "m"), tiny_model)
    assert describe(tmp_path / "m")["files"] == [shard.name for shard in shards]

    index = tmp_path / "m" / "model.safetensors.index.json"
    text = index.read_text()
    table = json.loads(text)
    some = next(iter(table["weight_map"]))
    for change in ({some: shards[-1].name}, {"ghost": shards[0].name}):
        index.write_text(json.dumps({"weight_map": table["weight_map"] | change}))
        with pytest.raises(CheckpointError, match="disagree about"):
            open_checkpoint(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {some: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="no weight_map of file names"):
        open_checkpoint(tmp_path / "m")
    index.write_text(text)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shards[0].name}"):
        open_checkpoint(tmp_path / "m")


def test_saving_again_replaces_shards_and_keeps_bystanders(tmp_path: Path, tiny_model: UniLIP) -> None:
    folder = tmp_path / "m"
    tiny_model.save_pretrained(folder, max_shard_size="1MB")
    (folder / "trainer.json").write_text("{}")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.txt").write_text("a")
    links = {"self": ".", "samples/up": "..", "gone": "nowhere", "card": "README.md"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    tiny_model.save_pretrained(folder)
    assert {name: os.readlink(folder / name) for name in links} == links, "links stay links"
    assert sorted(p.name for p in folder.glob("model*")) == ["model.safetensors"]
    assert (folder / "trainer.json").exists()
    assert (folder / "samples" / "a.txt").read_text() == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_interrupted_save_leaves_the_old_checkpoint_whole(
    tmp_path: Path, tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    tiny_model.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real, calls = write.save_file, []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(write, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(folder, max_shard_size="1MB")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(tmp_path / "new", max_shard_size="1MB")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_one_clear_line(
    tmp_path: Path, tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "m", tmp_path / ("x" * 250)):
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*give another folder"):
            tiny_model.save_pretrained(folder)
    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left.*Make room"):
        tiny_model.save_pretrained(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path, tiny_model: UniLIP) -> None:
    folder = tmp_path / "m"
    tiny_model.save_pretrained(folder)
    folder.rename(tmp_path / ".m.previous")
    with pytest.raises(CheckpointError, match=r"interrupted save left the old one whole in .*\.m\.previous"):
        open_checkpoint(folder)
    tiny_model.save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path, tiny_model: UniLIP) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(CheckpointError, match="not a UniLIP checkpoint"):
        tiny_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a UniLIP checkpoint"):
        tiny_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a file or a link"):
        tiny_model.save_pretrained(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "words"
    (tmp_path / "empty").mkdir()
    tiny_model.save_pretrained(tmp_path / "empty")
    assert open_checkpoint(tmp_path / "empty").kind == "unilip"


def test_what_does_not_fit_its_config_is_not_saved(tmp_path: Path, tiny_model: UniLIP) -> None:
    state = dict(tiny_model.state_dict())
    state.pop("mllm.queries")
    with pytest.raises(CheckpointError, match=r"mllm\.queries\) is missing"):
        save(state, tiny_model.config, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_metadata_and_sizes(tmp_path: Path, tiny_model: UniLIP) -> None:
    save(tiny_model, tiny_model.config, tmp_path / "m", metadata={"stage": "recon", "step": "7"})
    assert open_checkpoint(tmp_path / "m").metadata == {"stage": "recon", "step": "7"}
    assert (parse_size("5GB"), parse_size("1.5 mb"), parse_size(10)) == (5 * 10**9, 1_500_000, 10)
    for wrong in ("", "5TB", "-1GB", 0):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(wrong)


def test_converting_takes_tokenizer_dtype_and_shards_along(tmp_path: Path, tiny_folder: Path) -> None:
    folder = write.convert(tiny_folder, tmp_path / "m", to="authors", dtype="bfloat16", max_shard_size="1MB")
    assert (folder / "tokenizer.json").exists()
    opened = open_checkpoint(folder)
    assert opened.kind == "authors"
    assert {opened.dtype(name) for name in opened.names} == {torch.bfloat16}
    model = UniLIP.from_pretrained(folder)
    assert model.processor is not None
    assert (
        opened.image_token_id
        == model.processor.image_id
        == json.loads((folder / "config.json").read_text())["image_token_id"]
    )


# --- finding ----------------------------------------------------------------------------------------------------------


def test_the_embedded_model_or_a_clear_error(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="no embedded model"):
        resolve(None)
    shutil.copytree(tiny_folder, tmp_path / "weights")
    assert resolve(None) == tmp_path / "weights" == resolve("embedded")


def test_only_what_is_needed_is_fetched() -> None:
    released = [
        ".gitattributes", "README.md", "config.json", "generation_config.json", "tokenizer.json", "merges.txt",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "demo.png", "pytorch_model.bin", "training_args.bin", "optimizer/model.safetensors",
    ]  # fmt: skip
    assert sorted(needed_files(released)) == [
        "config.json", "merges.txt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    sana = [
        "model_index.json", "text_encoder/model.safetensors", "transformer/config.json",
        "scheduler/scheduler_config.json",
        "transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert needed_files(sana) == [
        "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert needed_files(sana, "fp16")[-1] == "transformer/diffusion_pytorch_model.fp16.safetensors"
    ours = ["model/config.json", "model/model.safetensors", "model_index.json", "tokenizer/tokenizer.json"]
    assert sorted(needed_files([*ours, "pipeline.py", "model/network.py", "README.md"])) == ours


def test_hub_ids_reach_the_client(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    import huggingface_hub

    calls: list[Any] = []
    given: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def list_repo_files(self, repo: str, revision: str | None) -> list[str]:
            return ["1b_unilip.pth"] if repo == "some/tokenizer" else [p.name for p in tiny_folder.iterdir()]

        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append(("create", repo, options["private"]))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options["repo_id"], Path(options["folder_path"]).name))
            return f"https://huggingface.co/{options['repo_id']}/commit/1"

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str] | None = None, **options: Any) -> str:
        calls.append((repo, revision, allow_patterns and "model.safetensors" in allow_patterns))
        given.append(options)
        return str(tiny_folder)

    def download(repo: str, file: str, revision: str | None, **options: Any) -> str:
        calls.append((repo, file, revision))
        given.append(options)
        return str(tiny_folder / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert open_checkpoint("owner/name").kind == "unilip"
    assert open_checkpoint("owner/name@v1.0").kind == "unilip"
    assert open_checkpoint("owner/name/file.safetensors@main").kind == "unilip"
    assert calls == [
        ("owner/name", None, True),
        ("owner/name", "v1.0", True),
        ("owner/name", "file.safetensors", "main"),
    ]
    calls.clear()
    assert UniLIP.from_pretrained("owner/name", revision="v2", token="t", cache_dir="c").config == open_checkpoint(
        "owner/name/file.safetensors", revision="v3", local_files_only=True
    ).config  # fmt: skip
    open_checkpoint("owner/name@v4", local_files_only=True)
    assert calls == [("owner/name", "v2", True), ("owner/name", "file.safetensors", "v3"), ("owner/name", "v4", None)]
    assert given[-3:] == [
        {"token": "t", "cache_dir": "c"},
        {"token": None, "cache_dir": None, "local_files_only": True},
        {"token": None, "cache_dir": None, "local_files_only": True},
    ]
    for options, message in (
        ({"revison": "v1"}, "no option for loading 'revison'; allowed: revision, token, cache_dir"),
        ({"revision": 1}, "revision is 1"),
        ({"variant": "../x"}, "a word like fp16"),
        ({"variant": "fp16"}, "no weights of the variant fp16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint("owner/name", **options)
    opened = open_checkpoint(tiny_folder)
    for options, message in (({"devise": "cpu"}, "no option for loading"), ({"variant": "x"}, "opened already")):
        with pytest.raises(UniLIPError, match=message):
            UniLIP.from_pretrained(opened, **options)
    with pytest.raises(CheckpointError, match="names one revision"):
        open_checkpoint("owner/name@v1", revision="v2")
    with pytest.raises(CheckpointError, match=r"some/tokenizer/1b_unilip\.pth"):
        open_checkpoint("some/tokenizer")
    calls.clear()
    assert push_to_hub(tiny_folder, "me/mine", private=True).endswith("/commit/1")
    assert calls == [("create", "me/mine", True), ("upload", "me/mine", tiny_folder.name)]
    assert UniLIP.from_pretrained(tiny_folder).push_to_hub("me/mine").endswith("/commit/1")
    assert calls[-1] == ("upload", "me/mine", "model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        push_to_hub(tiny_folder.parent, "me/mine")


def test_a_variant_is_chosen_by_the_names_of_the_files(tmp_path: Path, tiny_folder: Path) -> None:
    whole = UniLIP.from_pretrained(tiny_folder)
    for size, names in (
        ("5GB", {"model.safetensors": "model.fp16.safetensors"}),
        ("1MB", {"model-": "model.fp16-", "model.safetensors.index.json": "model.safetensors.index.fp16.json"}),
    ):
        folder = tmp_path / size
        whole.save_pretrained(folder, max_shard_size=size, dtype=torch.float16)
        for path in sorted(folder.glob("model*")):
            for old, new in names.items():
                if path.name.startswith(old):
                    if path.suffix == ".json":
                        path.write_text(path.read_text().replace("model-", "model.fp16-"))
                    path.rename(folder / path.name.replace(old, new))
        (folder / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes())
        assert UniLIP.from_pretrained(folder, dtype="auto").dtype == torch.float32
        assert open_checkpoint(folder, variant="fp16").dtype("mllm.queries") == torch.float16
        with pytest.raises(CheckpointError, match=r"expected one of model\.bf16\.safetensors"):
            open_checkpoint(folder, variant="bf16")


# --- describing -------------------------------------------------------------------------------------------------------


def test_describe_says_what_there_is(tiny_folder: Path, tiny_model: UniLIP) -> None:
    data = describe(tiny_folder)
    assert json.loads(json.dumps(data)) == data
    assert data["kind"] == "unilip"
    assert data["parameters"] == sum(p.numel() for p in tiny_model.parameters()) == sum(data["parts"].values())
    assert list(data["parts"]) == list(PARTS)
    assert data["tokenizer"] is True
    assert data["interpolation_scale"] == 1.0
    assert data["size_on_disk"] == (tiny_folder / "model.safetensors").stat().st_size
    assert data["config"]["format"] == "unilip"


def test_describe_a_part(tmp_path: Path, fresh_model: Callable[..., UniLIP]) -> None:
    fresh_model(parts=("encoder",)).save_pretrained(tmp_path / "m")
    data = describe(tmp_path / "m")
    assert data["interpolation_scale"] is None
    assert data["position_embedding"] == "no diffusion transformer here"
    assert data["language_head"] == "no language model here"


def test_damaged_names_are_found_even_when_shapes_fit(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state["dit.transformer.scale_shift_tab1e"] = state.pop("dit.transformer.scale_shift_table")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is missing; 1 tensor \(dit\.transformer\.scale_shift_tab1e\) is unexpected"
    ):
        open_checkpoint(folder)


# --- hostile and ambiguous folders ------------------------------------------------------------------------------------


def test_an_index_and_a_single_file_side_by_side_are_not_chosen_between(tmp_path: Path, tiny_model: UniLIP) -> None:
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    tiny_model.save_pretrained(tmp_path / "single")
    for first, second in (("shards", "single"), ("single", "shards")):
        both = shutil.copytree(tmp_path / first, tmp_path / f"{first}-first")
        shutil.copytree(tmp_path / second, both, dirs_exist_ok=True)
        with pytest.raises(CheckpointError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
            open_checkpoint(both)
        (both / "model.safetensors.index.json").unlink()
        assert open_checkpoint(both).weights.files == (both / "model.safetensors",)


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path, tiny_model: UniLIP) -> None:
    before = os.umask(0o027)
    try:
        tiny_model.save_pretrained(tmp_path / "m", max_shard_size="1MB")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "m").iterdir()} == {0o640}


def test_one_shard_is_held_at_a_time(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that was read for one file is gone before the first of the next is read."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most, read = [0], Weights.read

    def watched(self: Weights, origin: Any) -> torch.Tensor:
        tensor = read(self, origin)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(Weights, "read", watched)
    real, tensors_of_file = write.save_file, []
    held: list[weakref.ref[torch.Tensor]] = []

    def saving(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        assert all(ref() is None for ref in held), "the last file's tensors are still there"
        held[:] = [weakref.ref(t) for t in tensors.values()]
        tensors_of_file.append(len(tensors))
        real(tensors, *rest)

    monkeypatch.setattr(write, "save_file", saving)
    write.convert(tiny_folder, tmp_path / "m", max_shard_size="500KB")
    assert len(tensors_of_file) > 2 and most[0] <= 2, "tensors are copied one by one"


def test_configurations_that_no_weights_bear_out_are_refused_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_folder / "config.json").read_text())
    cases = {
        "layers": {"text": data["text"] | {"num_layers": 10**9}},
        "blocks": {"decoder": data["decoder"] | {"layers_per_block": [1, 1, 1, 1, 1, 10**7]}},
        "scales": {"decoder": data["decoder"] | {"qkv_multiscales": [[], [], [], [5] * 10**5, [5], [5]]}},
        "width": {"dit": data["dit"] | {"num_heads": 10**12, "num_cross_heads": 10**12}},
        "grid": {"dit": data["dit"] | {"sample_size": 10**6}},
        "queries": {"num_queries": 10**15, "text": data["text"] | {"max_positions": 10**16}},
        "ratio": {"dit": data["dit"] | {"mlp_ratio": 1e300}},
        "text": {"text": {"num_layers": "4"}},
        "nan": {"latent_factor": float("nan")},
    }
    folder, passed = shutil.copytree(tiny_folder, tmp_path / "m"), []
    for name, change in cases.items():
        (folder / "config.json").write_text(json.dumps(data | change))
        started = time.process_time()
        try:
            open_checkpoint(folder)
            passed.append(name)
        except CheckpointError as error:
            assert len(str(error)) < 1000 and time.process_time() - started < 3, name
    assert passed == []


def test_hostile_weights_and_foreign_configs_are_errors_of_ours(tiny_folder: Path, tmp_path: Path) -> None:
    parity = Path(__file__).parent / "parity"
    data, passed = json.loads((parity / "config.json").read_text()), []
    changes: tuple[dict[str, Any], ...] = (
        {"text_config": []}, {"text_config": {}}, {"vision_config": 7}, {"vision_config": {"norm_type": ["x"]}},
        {"text_config": data["text_config"] | {"num_attention_heads": "4"}}, {"unilip_factor": "much"},
        {"text_config": data["text_config"] | {"rope_scaling": "x"}}, {"unilip_factor": 10**400},
        {"text_config": data["text_config"] | {"rms_norm_eps": None}}, {"dit_path": 5, "connect_layer": {}},
        {"text_config": data["text_config"] | {"max_position_embeddings": 1e3}},
    )  # fmt: skip
    for number, change in enumerate(changes):
        folder = shutil.copytree(parity, tmp_path / str(number))
        (folder / "config.json").write_text(json.dumps(data | change))
        try:
            open_checkpoint(folder)
            passed.append(change)
        except CheckpointError:
            pass
    assert passed == [{"dit_path": 5, "connect_layer": {}}], "all but what is not needed"
    path = tmp_path / "bomb.pth"
    for state in (
        {"mlp1.0.weight": torch.zeros(1).expand(10**12)},
        {"mlp1.0.weight": torch.zeros(2, 2).to_sparse()},
        {"mlp1.0.weight": torch.zeros(2, device="meta")},
        {5: torch.zeros(1)},
    ):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match="not supported"):
            open_checkpoint(path)
    header = b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}'
    for size, text in ((10**15, b"{}"), (len(header), header + bytes(8)), (0x59544F4344213C, b"PE html>")):
        content = size.to_bytes(8, "little") + text
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            open_checkpoint(tmp_path / "model.safetensors")


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_model_card_tells_what_was_saved_and_stays_when_rewritten(tmp_path: Path, tiny_model: UniLIP) -> None:
    from huggingface_hub import ModelCard

    for name, licence, base, words in (
        ("pico", "apache-2.0", None, "Fluent Emoji"),
        ("1b", "other", "kanashi6/UniLIP-1B", "Say here what these weights were trained on"),
        ("mine", "other", None, "Say here"),
    ):
        save(tiny_model, tiny_model.config.replace(name=name), tmp_path / name, dtype="bfloat16")
        card = ModelCard.load(tmp_path / name / "README.md")
        assert (card.data.library_name, card.data.license, card.data.base_model) == ("unilip", licence, base)
        assert card.data.pipeline_tag == "text-to-image" and "image-to-image" in card.data.tags
        assert words in card.text and "in bfloat16, for pictures of 56 pixels" in card.text
        assert "model.generate(" in card.text and "model.ask(" in card.text
    (tmp_path / "mine" / "README.md").write_text("my own words")
    save(tiny_model, tiny_model.config, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"
    decoder = {k: v for k, v in tiny_model.state_dict().items() if k.startswith("pixel_decoder.")}
    save(decoder, tiny_model.config, tmp_path / "decoder")
    assert "pipeline_tag" not in (tmp_path / "decoder" / "README.md").read_text()


def test_half_a_hub_cache_says_what_to_do(tmp_path: Path, tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny_model.save_pretrained(tmp_path / "own", max_shard_size="1MB")
    files = sorted(tmp_path.joinpath("own").iterdir())
    shard = next(file.name for file in files if "-00001-of-" in file.name)

    def cached(name: str, keep: Callable[[str], bool]) -> Path:
        root = tmp_path / "hub" / f"models--me--{name}"
        for folder in ("refs", "blobs", "snapshots/abc"):
            (root / folder).mkdir(parents=True)
        (root / "refs" / "main").write_text("abc")
        for number, file in enumerate(files):
            if keep(file.name):
                shutil.copy(file, root / "blobs" / str(number))
                (root / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
        return root / "snapshots" / "abc" / shard

    cached("whole", lambda name: True)
    cached("config", lambda name: name == "config.json")
    cached("shard", lambda name: name != shard)
    cached("pruned", lambda name: True).resolve().unlink()
    for name, content in (
        ("empty", b""),
        ("page", b"<!DOCTYPE html>"),
        ("cut", (tmp_path / "own" / shard).read_bytes()[:999]),
    ):
        cached(name, lambda name: True).resolve().write_bytes(content)
    assert open_checkpoint("me/whole").parts == tuple(PARTS)
    for name, message in (
        ("config", "no weights"), ("shard", f"lacks {shard}"), ("pruned", f"lacks {shard}"),
        ("none", "could not be fetched"), ("empty", "truncated"), ("page", "truncated"), ("cut", "truncated"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(f"me/{name}")
