"""Seeing a training: report, history, figure, logger; inspection of saved files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spartan
from spartan import cli
from spartan.saving.tables import text_table
from spartan.sparsifier import stability

TOTAL = 20


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 16), nn.Linear(16, 4))


def start(method: spartan.Spartan | spartan.RigL | spartan.Dense | spartan.GMP, **settings: Any) -> Any:
    model = network()
    sparsifier = spartan.Sparsifier(model, method, TOTAL, **settings)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sparsifier.attach(optimizer)

    def steps(count: int) -> float:
        for _ in range(count):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(sparsifier.step_count))
            loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return model, sparsifier, steps


def test_rows_say_what_the_masks_are() -> None:
    _, sparsifier, steps = start(spartan.Spartan(sparsity=0.6, block_size=(8, 4)))
    steps(7)
    report = sparsifier.report()
    assert [(row.name, row.shape, row.block_size) for row in report.rows] == [
        ("0.weight", (40, 24), (8, 4)),
        ("3.weight", (16, 40), (8, 4)),
    ]
    masks = {name: mask.hard.clone() for name, mask in sparsifier.masks().items()}
    kept = sparsifier.kept_fractions()
    sizes = {"0.weight": 960, "3.weight": 640}
    spent = sum(kept[name] * sizes[name] for name in sizes)
    for row in report.rows:
        assert row.sparsity == pytest.approx(1 - kept[row.name])
        assert row.cost_share == pytest.approx(kept[row.name] * sizes[row.name] / spent)
        assert row.churn is None
    steps(9)
    later = {row.name: row.churn for row in sparsifier.report().rows}
    for name, now in sparsifier.masks().items():
        before = masks[name]
        both, either = int((before & now.hard).sum()), int((before | now.hard).sum())
        assert later[name] == pytest.approx(1 - both / either)
    assert max(later.values()) > 0
    assert all(row.churn == 0 for row in sparsifier.report().rows), "nothing happened since the last report"
    assert (report.step, report.total_steps, report.method, report.frozen) == (7, TOTAL, "Spartan", False)
    assert report.beta == pytest.approx(1 + 3 * 7 / 16) and report.sparsity == pytest.approx(0.6, abs=0.02)


def test_the_masks_of_a_report_are_its_own() -> None:
    """Masks are updated in place: what churn is measured from must not move with them."""
    _, sparsifier, steps = start(spartan.RigL(sparsity=0.6, interval=2))
    sparsifier.report()
    steps(4)
    assert any(row.churn for row in sparsifier.report().rows)


def test_what_is_skipped_is_said_with_the_reason() -> None:
    _, sparsifier, _ = start(spartan.GMP(sparsity=0.5), exclude="3.weight")
    report = sparsifier.report()
    assert report.skipped == sparsifier.skipped and report.skipped["3.weight"] == "excluded"
    text = str(report)
    assert "not masked (excluded): 3.weight" in text and "0.bias, 1.bias, 3.bias, 4.bias" in text


def test_an_emptied_weight_is_said() -> None:
    model, sparsifier, _ = start(spartan.GMP(sparsity=0.5))
    assert "nothing is kept" not in str(sparsifier.report())
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(1e-6)
    with pytest.warns(
        UserWarning, match=r"finalize\(\) keeps nothing of 3\.weight: .* distribution='uniform' or 'erk'"
    ):
        sparsifier.finalize()
    assert "nothing is kept (the layer is its bias alone): 3.weight" in str(sparsifier.report())


def test_cost_shares_are_in_the_unit_of_the_costs() -> None:
    costs = {"0.weight": 1.0, "3.weight": 3.0}
    _, sparsifier, _ = start(spartan.Spartan(sparsity=0.5), costs=lambda name, module, grid: costs[name])
    shares = {row.name: row.cost_share for row in sparsifier.report().rows}
    assert shares == pytest.approx({"0.weight": 960 / (960 + 3 * 640), "3.weight": 3 * 640 / (960 + 3 * 640)})


def test_a_finalized_sparsifier_reports_what_it_did() -> None:
    model, sparsifier, steps = start(spartan.Spartan(sparsity=0.6))
    steps(TOTAL)
    sparsifier.finalize()
    report = sparsifier.report()
    assert report.frozen and report.sparsity == pytest.approx(0.6, abs=1e-3)
    for row in report.rows:
        weight = model.get_parameter(row.name)
        assert row.sparsity == pytest.approx(1 - int(weight.count_nonzero()) / weight.numel())
    assert "masks fixed" in str(report) and report is sparsifier.report()


def test_a_dense_model_reports_no_rows() -> None:
    _, sparsifier, _ = start(spartan.Dense())
    report = sparsifier.report()
    assert report.rows == () and "Dense, step 0 of 20" in str(report)


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables_are_text(with_rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    rows = [("a long name " * 20, "1"), ("b[/]", "[bold]22")]
    lines = text_table("Title", ("name", "number"), rows, ["a note"]).splitlines()
    assert lines[0] == "Title" and lines[-1] == "a note"
    assert [line for line in lines if ("a long name " * 20).strip() in line], "nothing is cut"
    assert any("b[/]" in line and line.endswith("[bold]22") for line in lines)
    assert any(line.endswith("       1") for line in lines), "numbers are aligned to the right"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [([1, 1, 0, 0], [1, 0, 1, 0], 1 / 3), ([1, 0], [1, 0], 1.0), ([1, 0], [0, 1], 0.0), ([0, 0], [0, 0], 1.0)],
)
def test_stability(before: list[int], now: list[int], expected: float) -> None:
    assert stability(torch.tensor(before).bool(), torch.tensor(now).bool()) == pytest.approx(expected)


class Writer:
    """As TensorBoard's."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written.append((tag, scalar_value, global_step))


def test_history_records_and_logs() -> None:
    _, sparsifier, steps = start(spartan.Spartan(sparsity=0.6, block_size=4))
    writer = Writer()
    history = spartan.History(sparsifier, interval=2, on_step=spartan.scalars_to(writer))
    hard = {}
    for _ in range(TOTAL):
        loss = steps(1)
        history.record(loss=torch.tensor(loss, requires_grad=True))
        hard[sparsifier.step_count] = {name: mask.hard.clone() for name, mask in sparsifier.masks().items()}
        if sparsifier.step_count % 2 == 0:
            row = history.rows[-1]
            assert row["loss"] == pytest.approx(loss) and row["step"] == sparsifier.step_count
            assert (row["sparsity"], row["beta"]) == (sparsifier.sparsity, sparsifier.beta)
            assert row["kept"] == sparsifier.kept_fractions()
            kept = row["kept"]["0.weight"] * 960 + row["kept"]["3.weight"] * 640
            assert row["budget"] == pytest.approx(kept / 1600)
    assert [row["step"] for row in history.rows] == list(range(2, TOTAL + 1, 2))
    assert history.rows[0]["stability"] == {}
    for row in history.rows[1:]:
        for name, found in row["stability"].items():
            assert found == stability(hard[row["step"] - 2][name], hard[row["step"]][name])
    last = {name: value for name, value, step in writer.written if step == TOTAL}
    row = history.rows[-1]
    assert set(last) == {
        *("loss", "sparsity", "beta", "budget", "kept/0.weight", "kept/3.weight"),
        *("stability/0.weight", "stability/3.weight"),
    }
    assert last["kept/3.weight"] == row["kept"]["3.weight"] and last["budget"] == row["budget"]


def test_history_goes_on_from_its_state() -> None:
    _, sparsifier, steps = start(spartan.RigL(sparsity=0.6, interval=3))
    whole, cut = spartan.History(sparsifier), spartan.History(sparsifier)
    for step in range(TOTAL):
        steps(1)
        whole.record()
        cut.record()
        if step == 9:
            state = cut.state_dict()
            cut = spartan.History(sparsifier)
            cut.load_state_dict(state)
    assert cut.rows == whole.rows and len(state["rows"]) == 10


def test_history_as_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, sparsifier, steps = start(spartan.RigL(sparsity=0.6, interval=3))
    history = spartan.History(sparsifier)
    with pytest.raises(ValueError, match="at least one record"):
        history.save_figure(tmp_path / "figure.png")
    for _ in range(3):
        steps(1)
        history.record()
    history.save_figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments_of_a_history_are_named() -> None:
    _, sparsifier, _ = start(spartan.Dense())
    with pytest.raises(TypeError, match=r"sparsifier must be a spartan\.Sparsifier; got Sequential"):
        spartan.History(network())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interval must be an int of at least 1; got 0"):
        spartan.History(sparsifier, interval=0)


@pytest.fixture
def saved(tmp_path: Path) -> nn.Module:
    """A model whose weights have blocks of 8, single zeros, and none, saved as this package does and dense."""
    model = network()
    with torch.no_grad():
        grid = torch.arange(15).view(5, 3) % 3 == 0
        model[0].weight.mul_(grid.repeat_interleave(8, 0).repeat_interleave(8, 1))
        model[3].weight.mul_(torch.rand(16, 40, generator=torch.Generator().manual_seed(0)) > 0.9)
        for layer in (model[0], model[3]):
            layer.weight.add_(0.0)  # no negative zeros, as after finalize
    spartan.save_pretrained(model, tmp_path / "packed")
    spartan.save_pretrained(model, tmp_path / "dense", dense=True)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    return model


@pytest.mark.parametrize(
    "place", ["packed", "packed/model.safetensors", "dense", "dense/spartan.json", "other.safetensors"]
)
def test_inspection_of_files(place: str, saved: nn.Module, tmp_path: Path) -> None:
    found = spartan.inspect_file(tmp_path / place)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert set(tensors) == set(saved.state_dict())
    for name, value in saved.state_dict().items():
        assert tensors[name].shape == tuple(value.shape)
        assert tensors[name].zeros == value.numel() - int(value.count_nonzero())
    assert tensors["0.weight"].block_size == (8, 8) and tensors["4.weight"].block_size is None
    assert found.file_bytes == found.path.stat().st_size
    assert found.dense_bytes == sum(value.nbytes for value in saved.state_dict().values())
    if place != "other.safetensors":  # nothing says there which are buffers
        parameters = list(saved.parameters())
        zeros = sum(int((p == 0).sum()) for p in parameters)
        assert found.sparsity == pytest.approx(zeros / sum(p.numel() for p in parameters))
        assert not tensors["1.running_mean"].parameter


def test_the_inspect_command(saved: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "packed")]) == 0
    shown = capsys.readouterr().out
    assert "0.weight" in shown and "8x8" in shown and "66.67%" in shown and "zeros among the parameters" in shown
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "other.safetensors").write_bytes(b"not a model")
    assert cli.main(["inspect", str(tmp_path / "other.safetensors")]) == 1
    assert "other.safetensors cannot be read" in capsys.readouterr().err
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert cli.main(["inspect", str(tmp_path / "packed")]) == 1
    assert "model.safetensors" in capsys.readouterr().err


EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, "bfloat16", "float64"])
def test_inspection_of_floats_of_any_width(dtype: str, tmp_path: Path) -> None:
    tensor = torch.zeros(32, 32)
    tensor[:8, :8] = 1
    tensor[20] = -0.0
    tensor = tensor.to(getattr(torch, dtype))
    save_file({"a": tensor}, tmp_path / "file.safetensors")
    found = spartan.inspect_file(tmp_path / "file.safetensors")
    (row,) = found.tensors
    assert (row.dtype, row.zeros, row.block_size) == (dtype, 1024 - 64, (8, 8))
    assert found.dense_bytes == row.stored_bytes == 1024 * tensor.element_size()
    assert dtype in str(found)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int8", "bool", "complex64"])
def test_inspection_of_other_numbers(dtype: str, tmp_path: Path) -> None:
    tensor = torch.tensor([[0, 1, 0, 1]] * 8).to(getattr(torch, dtype))
    save_file({"a": tensor}, tmp_path / "file.safetensors")
    (row,) = spartan.inspect_file(tmp_path / "file.safetensors").tensors
    assert (row.dtype, row.zeros, row.block_size, row.stored_bytes) == (dtype, 16, None, 32 * tensor.element_size())


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this PyTorch has no such dtype")
def test_a_number_without_zero_has_none(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, 8, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, tmp_path / "file.safetensors")
    (row,) = spartan.inspect_file(tmp_path / "file.safetensors").tensors
    assert row.zeros == 0


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no such dtype")
def test_a_tensor_whose_zeros_nobody_counts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"pairs": torch.zeros(8, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    assert cli.main(["inspect", str(path)]) == 1
    message = "file.safetensors: zeros of tensor 'pairs' of torch.float4_e2m1fn_x2 cannot be counted"
    assert message in capsys.readouterr().err
