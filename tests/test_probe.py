"""Measuring a device. Rates are whatever they are; what is kept of them is tested."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch

from deft_tvm.device import DeviceProfile
from deft_tvm.tuning import probe as probing
from deft_tvm.tuning.probe import device_file, probe, write_profile

NOMINAL = DeviceProfile.nominal()


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(probing, "SECONDS", 0.0)
    monkeypatch.setattr(probing, "MATRIX_SIZES", {"cpu": (16, 64)})


def test_a_probe_changes_rates_alone() -> None:
    found = probe(NOMINAL)
    assert found.measured and found.date
    rates = {
        name: getattr(NOMINAL, name) for name in ("read_bandwidth", "matrix_rate", "launch_seconds")
    }
    assert msgspec.structs.replace(found, measured=False, date="", **rates) == NOMINAL


def test_every_rate_is_a_positive_number() -> None:
    found = probe(NOMINAL)
    rates = [found.read_bandwidth, found.launch_seconds, *found.matrix_rate.values()]
    assert found.matrix_rate.keys() == NOMINAL.matrix_rate.keys()
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_a_type_without_a_fast_kernel_is_not_tried_large(monkeypatch) -> None:
    sizes = []

    def slow(device: DeviceProfile, call) -> float:
        sizes.append(call.args[0].shape[0])
        return 1.0

    monkeypatch.setattr(probing, "_best_seconds", slow)
    assert probing._matrix_rate(NOMINAL, "float16") == 2 * 16**3
    assert sizes == [16]


def test_a_launch_on_a_busy_machine_is_not_believed(monkeypatch) -> None:
    monkeypatch.setattr(probing, "_best_seconds", lambda device, call: 0.01)
    assert probing._launch_seconds(NOMINAL) == NOMINAL.launch_seconds
    monkeypatch.setattr(probing, "_best_seconds", lambda device, call: 2e-6)
    assert probing._launch_seconds(NOMINAL) == 2e-6


def test_the_best_round_counts(monkeypatch) -> None:
    ticks = iter([0.0, 0.0, 5.0, 5.0, 7.0, 7.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(probing.time, "perf_counter", lambda: next(ticks))
    assert probing._best_seconds(NOMINAL, lambda: None) == 2.0


def test_a_profile_is_written_whole(tmp_path) -> None:
    path = write_profile(NOMINAL, tmp_path)
    assert path == device_file(NOMINAL, tmp_path)
    assert DeviceProfile.read(path) == NOMINAL
    later = msgspec.structs.replace(NOMINAL, measured=True, read_bandwidth=1.0)
    write_profile(later, tmp_path)
    assert DeviceProfile.read(path) == later
    assert list(path.parent.iterdir()) == [path], "nothing is left of writing"


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    probe(NOMINAL)
    assert torch.get_num_threads() == before
