"""Saving into folders where other tools have files, and reading those that older versions saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spartan
from spartan.saving.export import CONFIG_FILE, MODEL_FILE


def model(value: float = 1.0) -> nn.Linear:
    layer = nn.Linear(16, 16)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def value_in(folder: Path) -> float:
    loaded = spartan.load_pretrained(nn.Linear(16, 16), folder)
    values = torch.cat([p.detach().flatten() for p in loaded.parameters()]).unique()
    assert len(values) == 1
    return float(values)


def foreign(folder: Path) -> dict[str, bytes]:
    """As Hugging Face's `save_pretrained` leaves a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_files_of_others_stay_as_they_are(tmp_path: Path) -> None:
    before = foreign(tmp_path)
    for value in (1.0, 2.0):
        spartan.save_pretrained(model(value), tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        assert value_in(tmp_path) == value
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "spartan.json", "spartan.safetensors"])
    assert {tensor.name for tensor in spartan.describe_pretrained(tmp_path)} == {"weight", "bias"}
    assert spartan.inspect_file(tmp_path).path == tmp_path / "spartan.safetensors"
    assert [t.shape for t in spartan.inspect_file(tmp_path / "model.safetensors").tensors] == [(3,)]
    assert len(spartan.inspect_file(tmp_path / "spartan.safetensors").tensors) == 2


def test_a_folder_of_others_alone_is_inspected_as_it_lies(tmp_path: Path) -> None:
    foreign(tmp_path)
    assert [tensor.shape for tensor in spartan.inspect_file(tmp_path).tensors] == [(3,)]
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} cannot be read"):
        spartan.load_pretrained(model(), tmp_path)


def test_others_may_save_beside_a_saved_model(tmp_path: Path) -> None:
    spartan.save_pretrained(model(1.0), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert value_in(tmp_path) == 1.0
    before = foreign(tmp_path)  # writes over the weights: there is nothing left to load
    with pytest.raises(ValueError, match=f"{MODEL_FILE} is damaged or does not belong to"):
        value_in(tmp_path)
    spartan.save_pretrained(model(3.0), tmp_path)
    assert value_in(tmp_path) == 3.0 and (tmp_path / MODEL_FILE).read_bytes() == before[MODEL_FILE]


def older(folder: Path, value: float) -> None:
    """As version 0.1 saved before the JSON had a name of its own."""
    spartan.save_pretrained(model(value), folder)
    (folder / CONFIG_FILE).rename(folder / "config.json")


def test_folders_of_older_versions_are_read_and_replaced(tmp_path: Path) -> None:
    older(tmp_path, 1.0)
    assert value_in(tmp_path) == 1.0
    assert spartan.inspect_file(tmp_path / "config.json").path == tmp_path / MODEL_FILE
    spartan.save_pretrained(model(2.0), tmp_path)
    assert value_in(tmp_path) == 2.0
    assert sorted(os.listdir(tmp_path)) == [MODEL_FILE, CONFIG_FILE]


def test_an_older_save_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    older(tmp_path, 1.0)
    sha256 = json.loads((tmp_path / "config.json").read_text())["sha256"]
    (tmp_path / MODEL_FILE).rename(tmp_path / f".{MODEL_FILE}.{sha256}")
    assert value_in(tmp_path) == 1.0
    spartan.save_pretrained(model(2.0), tmp_path)
    assert value_in(tmp_path) == 2.0
    assert sorted(os.listdir(tmp_path)) == [MODEL_FILE, CONFIG_FILE]


def test_our_own_damaged_weights_are_replaced(tmp_path: Path) -> None:
    spartan.save_pretrained(model(1.0), tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"half")
    spartan.save_pretrained(model(2.0), tmp_path)
    assert value_in(tmp_path) == 2.0 and sorted(os.listdir(tmp_path)) == [MODEL_FILE, CONFIG_FILE]
    (tmp_path / CONFIG_FILE).unlink()
    (tmp_path / MODEL_FILE).write_bytes(b"what nobody can read")  # may be anybody's
    spartan.save_pretrained(model(3.0), tmp_path)
    assert value_in(tmp_path) == 3.0 and (tmp_path / MODEL_FILE).read_bytes() == b"what nobody can read"


@pytest.mark.parametrize("name", [CONFIG_FILE, MODEL_FILE])
def test_a_pipe_in_the_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    spartan.save_pretrained(model(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*not a regular file"):
        value_in(tmp_path)


def test_the_json_cannot_lead_to_other_files(tmp_path: Path) -> None:
    foreign(tmp_path)
    spartan.save_pretrained(model(), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["weights"] == "spartan.safetensors"
    for name in ("../elsewhere.safetensors", "", 3, None):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "weights": name}))
        with pytest.raises(ValueError, match=f"{CONFIG_FILE} names weights"):
            spartan.load_pretrained(model(), tmp_path)


def test_dense_files_of_others_names_are_read_by_safetensors(tmp_path: Path) -> None:
    spartan.save_pretrained(model(2.0), tmp_path, dense=True)
    assert set(load_file(tmp_path / MODEL_FILE)) == {"weight", "bias"}
