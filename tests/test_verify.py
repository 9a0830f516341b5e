"""How recorded numbers are compared: honest about types, shapes and names, and never satisfied by nothing."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unilip.checkpoints.write import convert
from unilip.errors import CheckpointError
from unilip.verify import Row, format_rows, verify

PARITY = Path(__file__).parent / "parity"


def subset(tmp_path: Path, prefix: str, **changes: torch.Tensor) -> Path:
    """Write one group of the recorded numbers, some entries changed or added."""
    record = {k: v for k, v in load_file(PARITY / "expected.safetensors").items() if k.startswith(f"{prefix}.")}
    record |= {f"{prefix}.{entry}": value for entry, value in changes.items()}
    path = tmp_path / "expected.safetensors"
    save_file(record, path)
    return path


def test_groups_that_are_absent_are_skipped_and_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    rows = verify(PARITY, subset(tmp_path, "recon112"), progress=lambda *step: seen.append(step))
    assert [row.name for row in rows] == ["recon112.features"]
    assert seen == [(1, 1, "recon112.features")]


def test_a_wrong_number_a_wrong_shape_and_nan_fail(tmp_path: Path) -> None:
    features = load_file(PARITY / "expected.safetensors")["recon112.features"]
    for wrong, error in ((features + 2e-4, 2e-4), (features[:, :3], math.inf)):
        (row,) = verify(PARITY, subset(tmp_path, "recon112", features=wrong.contiguous()))
        assert not row.ok
        assert row.max_abs_error == pytest.approx(error, rel=0.05)
    (row,) = verify(PARITY, subset(tmp_path, "recon112", features=features * math.nan))
    assert not row.ok


def test_names_that_are_not_understood_are_failed_rows(tmp_path: Path) -> None:
    record = {"recon112.attention_maps": torch.zeros(2), "audio.waveform": torch.zeros(2)}
    path = subset(tmp_path, "recon112", attention_maps=torch.zeros(2))
    save_file(load_file(path) | record, path)
    rows = {row.name: row for row in verify(PARITY, path)}
    assert rows["recon112.features"].ok
    for name in record:
        assert not rows[name].ok
        assert rows[name].note == "not understood"


def test_a_group_without_its_inputs_fails_and_says_which(tmp_path: Path) -> None:
    path = tmp_path / "expected.safetensors"
    save_file({"recon.features": torch.zeros(2, 4, 64)}, path)
    (row,) = verify(PARITY, path)
    assert not row.ok
    assert "recon.pixel_values is not recorded" in row.note


@pytest.mark.parametrize("group", ["edit", "train_edit", "recon112"])
def test_inputs_of_another_kind_fail_and_say_so(group: str, tmp_path: Path) -> None:
    recorded = load_file(PARITY / "expected.safetensors")
    for entry in ("attention_mask", "pixel_values", "und_image"):
        value = recorded.get(f"{group}.{entry}")
        for other in () if value is None else (value[:0], torch.tensor(1), value[:1, ..., :-1].clone()):
            rows = verify(PARITY, subset(tmp_path, group, **{entry: other}))
            assert rows and not all(row.ok for row in rows) and len(format_rows(rows)) < 5000


def test_a_checkpoint_without_the_parts_fails_and_says_which(tmp_path: Path) -> None:
    state = {k: v for k, v in load_file(PARITY / "model.safetensors").items() if "model.vae_decoder." in k}
    data = convert(PARITY, tmp_path / "ours") / "config.json"
    folder = tmp_path / "decoder"
    folder.mkdir()
    (folder / "config.json").write_bytes(data.read_bytes())
    save_file(
        {
            "pixel_decoder." + k.removeprefix("model.vae_decoder."): v
            for k, v in state.items()
            if k.startswith("model.vae_decoder.decoder.")
        },
        folder / "model.safetensors",
    )
    (row,) = verify(folder, subset(tmp_path, "recon112"))
    assert not row.ok
    assert row.note == "the checkpoint has no encoder, latent_head"


def test_float16_entries_are_measured_from_their_rounding_interval(tmp_path: Path) -> None:
    features = load_file(PARITY / "expected.safetensors")["recon112.features"]
    (row,) = verify(PARITY, subset(tmp_path, "recon112", features=features.half()), tolerance=1e-5)
    assert row.ok
    assert row.tolerance == 1e-5
    assert "float16" in row.note
    (row,) = verify(PARITY, subset(tmp_path, "recon112", features=(features + 0.002).half()))
    assert not row.ok  # a real difference is not hidden by it


def test_whole_numbers_must_be_equal(tmp_path: Path) -> None:
    timesteps = load_file(PARITY / "expected.safetensors")["sampler.timesteps"]
    rows = verify(PARITY, subset(tmp_path, "sampler", timesteps=timesteps + 1), tolerance=10.0)
    assert [row.ok for row in rows if row.name == "sampler.timesteps"] == [False]


def test_rows_become_a_table() -> None:
    rows = [Row("a.b", 1e-6, 1e-4, True), Row("longer.name", math.inf, 1e-4, False, "not understood")]
    lines = format_rows(rows).splitlines()
    assert lines[1].split() == ["a.b", "1.0e-06", "1.0e-04", "ok"]
    assert lines[2].endswith("FAILED  (not understood)")
    assert lines[3] == "2 entries, 1 FAILED"
    assert format_rows(rows[:1]).endswith("1 entry, all within tolerance")


def test_the_file_of_numbers_must_be_one() -> None:
    with pytest.raises(CheckpointError, match="recorded numbers"):
        verify(PARITY, PARITY / "config.json")
    with pytest.raises(CheckpointError, match="recorded numbers"):
        verify(PARITY, PARITY / "nothing.safetensors")
