"""The authors' recorded numbers: each is recomputed, and two mistakes that nobody would notice are caught."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unilip.checkpoints.read import load_into, open_checkpoint
from unilip.checkpoints.write import convert
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.verify import INPUTS, Row, verify

PARITY = Path(__file__).parent / "parity"
EXPECTED = PARITY / "expected.safetensors"


def recorded() -> list[str]:
    with safe_open(EXPECTED, "pt") as file:
        return sorted(name for name in file.keys() if name.rpartition(".")[2] not in INPUTS)  # noqa: SIM118


def groups(path: Path, *names: str) -> Path:
    """Write some groups of the recorded numbers to a file of their own."""
    record = load_file(EXPECTED)
    save_file({name: value for name, value in record.items() if name.rpartition(".")[0] in names}, path)
    return path


def failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name} {row.max_abs_error:.1e} {row.note}" for row in rows if not row.ok]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return verify(PARITY, EXPECTED, tolerance=1e-4)


@pytest.fixture(scope="module")
def model() -> UniLIP:
    return UniLIP.from_pretrained(PARITY)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(PARITY, tmp_path_factory.mktemp("converted") / "ours")


def test_every_recorded_number_is_recomputed(rows: list[Row]) -> None:
    assert sorted(row.name for row in rows) == recorded()
    assert len(rows) == 47
    assert failures(rows) == []


def test_the_converted_checkpoint_gives_the_same_numbers(converted: Path, tmp_path: Path) -> None:
    rows = verify(converted, groups(tmp_path / "some.safetensors", "edit", "train_edit", "recon"))
    assert failures(rows) == []
    assert len(rows) == 19


def test_without_the_position_embedding_the_network_is_another(converted: Path, tmp_path: Path) -> None:
    data = json.loads((converted / "config.json").read_text())
    assert data["dit"]["interpolation_scale"] == 1.0
    data["dit"]["interpolation_scale"] = None
    (tmp_path / "some").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").hardlink_to(converted / "model.safetensors")
    rows = verify(tmp_path, groups(tmp_path / "some" / "expected.safetensors", "t2i", "train_t2i"))
    by_name = {row.name: row for row in rows}
    assert by_name["t2i.condition"].ok  # everything before the DiT is untouched
    for name in ("t2i.dit_first", "t2i.final_latents", "train_t2i.dit_out", "train_t2i.loss"):
        assert not by_name[name].ok
        assert by_name[name].max_abs_error > 0.05


@torch.no_grad()
def test_connector_attends_in_both_directions(model: UniLIP) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])

    def run(nudge: float) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, full = model.mllm.append_queries(model.mllm.embed(ids), mask)
        embeddings[:, -1] += nudge
        hidden = model.mllm(embeddings, full)
        return hidden, model.connector.connect(hidden, full)

    (hidden, connected), (hidden2, connected2) = run(0.0), run(1.0)
    first_valid = (torch.arange(2), torch.tensor([0, 1]))
    assert torch.equal(hidden[:, :-1], hidden2[:, :-1])  # the language model is causal
    assert (connected[first_valid] - connected2[first_valid]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_padding_changes_nothing_at_valid_positions(model: UniLIP) -> None:
    row = torch.tensor([[5, 6, 7, 8]])
    alone, _ = model.condition(Tokens(row, torch.ones_like(row), torch.zeros_like(row, dtype=torch.bool)))
    for side in ("left", "right"):
        pad = torch.zeros(1, 3, dtype=torch.long)
        order = [pad, row] if side == "left" else [row, pad]
        ids, mask = (
            torch.cat(order, 1),
            torch.cat([torch.zeros_like(t) if t is pad else torch.ones_like(t) for t in order], 1),
        )
        padded, full = model.condition(Tokens(ids, mask, torch.zeros_like(ids, dtype=torch.bool)))
        torch.testing.assert_close(padded[full.bool()][None], alone, atol=1e-5, rtol=0)


def test_half_precision_stays_near(model: UniLIP) -> None:
    opened = open_checkpoint(PARITY)
    with torch.device("meta"):
        half = UniLIP(opened.config)
    load_into(half, opened, dtype="bfloat16")
    row = torch.tensor([[5, 6, 7, 8]])
    tokens = Tokens(row, torch.ones_like(row), torch.zeros_like(row, dtype=torch.bool))
    with torch.no_grad():
        exact, rough = model.condition(tokens)[0], half.condition(tokens)[0]
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.std()
