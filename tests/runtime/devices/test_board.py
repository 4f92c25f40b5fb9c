"""Clocks, temperatures and power mode, read from fabricated trees laid out as boards lay theirs out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from xceptile.runtime.devices.board import MachineState, machine_state


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_jetson_orin(tmp_path):
    conf = "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n"
    files = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1420800\n",
        "sys/devices/system/cpu/cpu10/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "2201600\n",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq": "<unknown>\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "not a processor\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48812\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-1500\n",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone3/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone3/temp": "50000\n",
        "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
        "sys/class/devfreq/17000000.ga10b/cur_freq": "1300500000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": conf,
    }
    state = machine_state(tree(tmp_path, files))
    assert state == MachineState(
        governors={"cpu0": "schedutil", "cpu10": "performance"},
        cpu_khz={"cpu0": 1420800, "cpu10": 2201600},
        temperatures_c={"cpu-thermal": 48.812, "gpu-thermal": -1.5, "cpu-thermal 3": 50.0},
        gpu_hz=1_300_500_000,
        memory_hz=3_199_000_000,
        power_mode="MODE_30W (2)",
    )
    assert list(state.cpu_khz) == ["cpu0", "cpu10"]  # by number, not by letter
    assert json.loads(json.dumps(asdict(state)))["gpu_hz"] == 1_300_500_000


def test_a_nano_whose_power_modes_have_no_names(tmp_path):
    files = {
        "sys/class/devfreq/57000000.gpu/cur_freq": "921600000\n",
        "sys/kernel/debug/clk/emc/clk_rate": "1600000000\n",
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
    }
    state = machine_state(tree(tmp_path, files))
    assert (state.gpu_hz, state.memory_hz, state.power_mode) == (921_600_000, 1_600_000_000, "1")


def test_a_phone_with_an_adreno(tmp_path):
    state = machine_state(tree(tmp_path, {"sys/class/kgsl/kgsl-3d0/gpuclk": "680000000\n"}))
    assert state.gpu_hz == 680_000_000


def test_a_machine_that_shows_nothing(tmp_path):
    assert machine_state(tmp_path) == MachineState({}, {}, {}, None, None, None)


def test_this_machine_is_read_without_an_error():
    assert isinstance(machine_state(), MachineState)
