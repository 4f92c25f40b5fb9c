"""The native runtime's CUDA driver against a fake of NVIDIA's library: which calls, in which order, with which sizes,
and what is said when any of them fails. What a GPU would compute is not checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.cuda_emulator import FAKES, compile_fakes
from support.int8_graphs import Int8Builder, photo
from support.native_build import ADDRESS, LIBRARY, compile_program
from support.needs import requires, requires_module
from support.tree import SOURCES

from xceptile.compile.backends import cuda, native_runtime, nvrtc
from xceptile.compile.cuda_devices import cuda_devices
from xceptile.runtime.devices.qemu import emulator_command
from xceptile.runtime.plan import Argument, Launch, Plan, PlanTensor, Step, pack, unpack
from xceptile.targets import catalog

pytestmark = requires("clang", package="clang")

WEIGHTS = bytes(range(200))
FUNCTIONS = "conv 3\nfold 2\n"
KERNELS = {"kernels.cubin": "cubin sm_87\n", "kernels.ptx": "ptx\n", "kernels.cu": ""}
NO_PTX = {name: text for name, text in KERNELS.items() if name != "kernels.ptx"}


def plan(shared_bytes: int = 100_000) -> Plan:
    """Two kernels, the second with an operand inside another tensor's place; shapes that no other size equals."""
    x, y = Argument("arena", "int8", 0, 600), Argument("arena", "int8", 1024, 700)
    weights, logits = Argument("weights", "int8", 0, 200), Argument("arena", "int8", 2048, 10)
    steps = (
        Step(
            "conv",
            (x, weights, y),
            1,
            "first",
            "a.first",
            9,
            "convolution",
            2,
            Launch((5, 4, 3), (32, 2, 1), shared_bytes),
        ),
        Step("fold", (y, logits), 1, "second", "", 0, "mean", 1, Launch((10, 1, 1), (64, 1, 1))),
    )  # fmt: skip
    tensors = (
        PlanTensor("image", "input", "int8", (1, 10, 20, 3), 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, 10), 0.25, 3, 2048),
    )
    return Plan("cuda", 2560, 200, tensors, steps)


def write_bundle(
    folder: Path, changed: Plan | None = None, kernels: Mapping[str, str] = KERNELS, functions: str = FUNCTIONS
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: (text + functions).encode() for name, text in kernels.items()}
    order = ("kernels.cubin", "kernels.ptx", "kernels.cu")
    hashes = [hashlib.sha256(data).hexdigest() for data in (WEIGHTS, b"".join(files.get(n, b"") for n in order))]
    files |= {"weights.bin": WEIGHTS, "plan.bin": pack(changed or plan(), *hashes)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@dataclass(frozen=True)
class Done:
    status: int
    calls: list[str]
    error: str
    output: bytes
    said: str  # on standard output


@dataclass(frozen=True)
class Fake:
    """xceptile-run with the fakes of the driver and of NVRTC beside it."""

    folder: Path
    command: tuple[str, ...]

    def run(self, bundle: Path, *options: str, **environment: str) -> Done:
        """One inference on 600 bytes; ``environment`` is for the fakes and the runtime."""
        work = bundle.parent
        log, source, target = work / "log", work / "in.bin", work / "out.bin"
        log.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        source.write_bytes(bytes(600))
        settings = {
            "XCEPTILE_CUDA": str(self.folder / "driver.so"),
            "XCEPTILE_NVRTC": str(self.folder / "nvrtc.so"),
            "FAKE_LOG": str(log),
            **environment,
        }
        done = subprocess.run(
            [*self.command, *options, str(bundle), str(source), str(target)],
            capture_output=True, text=True, check=False, env={**os.environ, **settings},
        )  # fmt: skip
        calls = log.read_text().splitlines() if log.exists() else []
        output = target.read_bytes() if target.exists() else b""
        return Done(done.returncode, calls, done.stderr, output, done.stdout)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    """Built with sanitizers, so that an error path that leaks or frees twice is found."""
    folder = tmp_path_factory.mktemp("fake")
    compile_program(folder / "xceptile-run", SOURCES / "main.c", *LIBRARY, flags=ADDRESS)
    compile_fakes(folder, FAKES, "clang", "-g")
    return Fake(folder, (str(folder / "xceptile-run"),))


OPENING = [
    "cuInit 0",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet 0",
    "cuDeviceGetName 7 in 127 bytes",
    "cuDeviceGetAttribute 75 of 7",
    "cuDeviceGetAttribute 76 of 7",
    "cuDevicePrimaryCtxRetain 7",
    "cuCtxPushCurrent",
    "cuStreamCreate 1",
    'cuModuleLoadDataEx "cubin sm_87" options 2',
    "cuModuleGetFunction conv",
    "cuFuncGetParamInfo conv 2",
    "cuFuncGetParamInfo conv 3",
    "cuFuncLoad conv",
    "cuFuncSetAttribute conv 8 = 100000",
    "cuModuleGetFunction fold",
    "cuFuncGetParamInfo fold 1",
    "cuFuncGetParamInfo fold 2",
    "cuFuncLoad fold",
    "cuMemAlloc 2560",
    "cuMemAlloc 200",
    "cuMemcpyHtoDAsync 200",
    "cuStreamSynchronize",
    "cuDeviceGetAttribute 18 of 7",
]
LAUNCHES = [
    "cuLaunchKernel conv 5,4,3 x 32,2,1 shared 100000: device0+0 device1+0 device0+1024",
    "cuLaunchKernel fold 10,1,1 x 64,1,1 shared 0: device0+1024 device0+2048",
]
CLOSING = ["cuStreamDestroy", "cuMemFreeHost", "cuMemFree", "cuMemFree", "cuModuleUnload", "cuCtxPopCurrent"]


def test_a_plan_is_one_graph(fake: Fake, tmp_path: Path) -> None:
    done = fake.run(write_bundle(tmp_path / "b"))
    assert (done.status, done.error, done.output) == (0, "", bytes(10))
    assert done.calls == [
        *OPENING,
        "cuMemHostAlloc 1536 flags 0",  # 600 and 10 bytes, each from a multiple of 512 on
        "cuStreamBeginCapture 1",
        "cuMemcpyHtoDAsync 600 captured",
        *LAUNCHES,
        "cuMemcpyDtoHAsync 10 captured",
        "cuStreamEndCapture",
        "cuGraphInstantiate 0",
        "cuGraphDestroy",
        "cuCtxPopCurrent",
        "cuCtxPushCurrent",
        "cuGraphLaunch 2 kernels 2 copies",
        "cuStreamSynchronize",
        "cuCtxPopCurrent",
        "cuCtxPushCurrent",
        "cuGraphExecDestroy",
        *CLOSING,
        "cuDevicePrimaryCtxRelease 7",
    ]


def test_a_gpu_that_shares_the_memory_copies_nothing(fake: Fake, tmp_path: Path) -> None:
    done = fake.run(write_bundle(tmp_path / "b"), FAKE_INTEGRATED="1")
    assert (done.status, done.error) == (0, "")
    assert "cuMemHostAlloc 1536 flags 2" in done.calls
    assert not [call for call in done.calls if "captured" in call]
    assert "cuMemHostGetDevicePointer 0" in done.calls
    launches = [call.partition(": ")[2] for call in done.calls if call.startswith("cuLaunchKernel")]
    assert launches == ["host2+0 device1+0 device0+1024", "device0+1024 host2+1024"]


def test_an_operand_within_an_input_is_found_there(fake: Fake, tmp_path: Path) -> None:
    whole = plan()
    rest = Argument("arena", "int8", 512, 88)
    steps = (whole.steps[0], replace(whole.steps[1], arguments=(rest, whole.steps[1].arguments[1])))
    done = fake.run(write_bundle(tmp_path / "b", replace(whole, steps=steps)), FAKE_INTEGRATED="1")
    assert (done.status, done.error) == (0, "")
    assert next(call for call in done.calls if "cuLaunchKernel fold" in call).endswith(": host2+512 host2+1024")


def test_a_tensor_whose_memory_is_used_again_is_copied(fake: Fake, tmp_path: Path) -> None:
    """Another kernel's operand reaches over the input's place: it cannot lie elsewhere."""
    whole = plan()
    wide = Argument("arena", "int8", 512, 1200)
    steps = (whole.steps[0], replace(whole.steps[1], arguments=(wide, whole.steps[1].arguments[1])))
    done = fake.run(write_bundle(tmp_path / "b", replace(whole, steps=steps)), FAKE_INTEGRATED="1")
    assert done.status == 0
    assert [call for call in done.calls if "captured" in call] == ["cuMemcpyHtoDAsync 600 captured"]


@pytest.mark.parametrize("environment", [{"FAKE_NO_CAPTURE": "1"}, {"XCEPTILE_CUDA": "old.so"}], ids=lambda e: min(e))
def test_without_graphs_kernels_are_launched_one_by_one(
    fake: Fake, tmp_path: Path, environment: dict[str, str]
) -> None:
    settings = {k: str(fake.folder / v) if v.endswith(".so") else v for k, v in environment.items()}
    done = fake.run(write_bundle(tmp_path / "b"), **settings)
    assert (done.status, done.error, done.output) == (0, "", bytes(10))
    running = done.calls[done.calls.index("cuMemHostAlloc 1536 flags 0") + 1 :]
    copies = ["cuMemcpyHtoDAsync 600", *LAUNCHES, "cuMemcpyDtoHAsync 10", "cuStreamSynchronize"]
    around = ["cuCtxPopCurrent", "cuCtxPushCurrent"]
    begun = ["cuStreamBeginCapture 1"] if environment == {"FAKE_NO_CAPTURE": "1"} else []
    assert running == [*begun, *around, *copies, *around, *CLOSING, "cuDevicePrimaryCtxRelease 7"]


def test_timed_steps_lie_between_events(fake: Fake, tmp_path: Path) -> None:
    """In the graph too, as external ones: no others there can be asked for their time."""
    bundle = write_bundle(tmp_path / "b")
    for driver, event in (("driver", "cuEventRecordWithFlags 1"), ("old", "cuEventRecord")):
        done = fake.run(bundle, *TIMED, XCEPTILE_CUDA=str(fake.folder / f"{driver}.so"))
        assert (done.status, done.error) == (0, "")
        first = next(i for i, call in enumerate(done.calls) if call.startswith("cuMemcpyHtoDAsync 600"))
        assert done.calls[first + 1 : first + 6] == [event, LAUNCHES[0], event, LAUNCHES[1], event]
        graphs = [call for call in done.calls if call.startswith("cuGraphLaunch")]
        assert len(graphs) == (2 if driver == "driver" else 0)
        assert done.calls.count("cuEventElapsedTime 1.5") == 4  # of two runs
        assert done.calls.count("cuEventCreate 0") == done.calls.count("cuEventDestroy") == 3


TIMED = ("--repeat=1", "--warmup=0", "--layers")
CAPTURED = ["cuMemcpyHtoDAsync 600 captured", *LAUNCHES, "cuMemcpyDtoHAsync 10 captured"]


@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture 1", *CAPTURED, "cuStreamEndCapture", "cuGraphInstantiate 0"], ids=lambda c: c[:21]
)
def test_what_the_graph_lacks_is_launched_all_the_same(fake: Fake, tmp_path: Path, call: str) -> None:
    bundle = write_bundle(tmp_path / "b")
    failing = {"FAKE_FAIL_AT": str(fake.run(bundle).calls.index(call))}
    done = fake.run(bundle, **failing)
    assert (done.status, done.error, done.output) == (0, "", bytes(10))
    copies = ["cuMemcpyHtoDAsync 600", *LAUNCHES, "cuMemcpyDtoHAsync 10", "cuStreamSynchronize"]
    assert done.calls[-len(CLOSING) - len(copies) - 3 : -len(CLOSING) - 3] == copies
    said = json.loads(fake.run(bundle, "--describe", **failing).said)["device"]
    assert re.search(r"kernel by kernel \(.*: CUDA_ERROR_FAKE \(999\): says the fake\)$", said), said


def test_a_driver_that_takes_no_events_into_a_graph_times_steps_outside(fake: Fake, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    calls = fake.run(bundle, *TIMED).calls
    for index in [i for i, call in enumerate(calls) if call == "cuEventRecordWithFlags 1"]:
        done = fake.run(bundle, *TIMED, FAKE_FAIL_AT=str(index))
        assert (done.status, done.error) == (0, "")
        assert "cuGraphDestroy" in done.calls, "what was captured until then is not kept"
        event = "cuEventRecord"
        first = done.calls.index("cuMemcpyHtoDAsync 600")
        assert done.calls[first + 1 : first + 6] == [event, LAUNCHES[0], event, LAUNCHES[1], event]
        assert done.calls.count("cuEventElapsedTime 1.5") == 4  # of two runs


@pytest.mark.parametrize(
    ("capability", "kernels", "library", "loaded"),
    [
        ("87", KERNELS, "nvrtc.so", ['"cubin sm_87"']),
        ("90", KERNELS, "nvrtc.so", ['"cubin sm_87"', '"ptx"']),
        ("90", NO_PTX, "nvrtc.so", ['"cubin sm_87"', '"cubin sm_90"']),
        ("90", NO_PTX, "old_nvrtc.so", ['"cubin sm_87"', '"ptx"']),
        ("62", {"kernels.cu": ""}, "nvrtc.so", ['"cubin sm_62"']),
    ],
    ids=["binary", "ptx", "source", "source, old compiler", "source alone"],
)
def test_the_first_form_of_the_kernels_that_loads(
    fake: Fake, tmp_path: Path, capability: str, kernels: dict[str, str], library: str, loaded: list[str]
) -> None:
    settings = {"FAKE_CAPABILITY": capability, "XCEPTILE_NVRTC": str(fake.folder / library)}
    bundle = write_bundle(tmp_path / "b", kernels=kernels)
    done = fake.run(bundle, **settings)
    assert (done.status, done.error) == (0, "")
    assert [call.split(" ", 1)[1].removesuffix(" options 2") for call in done.calls if "ModuleLoad" in call] == loaded
    compiled = [call for call in done.calls if call.startswith("nvrtcCompileProgram")]
    words = f"--gpu-architecture={'compute' if 'old' in library else 'sm'}_{capability} --fmad=false --std=c++14"
    assert compiled == ([f"nvrtcCompileProgram {words}"] if "kernels.ptx" not in kernels else [])


def test_why_no_form_of_the_kernels_loads(fake: Fake, tmp_path: Path) -> None:
    bad = {"kernels.cubin": "cubin sm_53\n", "kernels.ptx": "rubbish\n", "kernels.cu": "#error\n"}
    done = fake.run(write_bundle(tmp_path / "b", kernels=bad))
    assert done.status == 2
    gpu = "Fake GPU?1, compute capability 8.7, driver for CUDA 12.6"
    said = f"the bundle's kernels do not run on this GPU ({gpu}): compile it for this board's target"
    assert done.error.splitlines() == [
        f"xceptile-run: {tmp_path / 'b'}: {said}",
        "kernels.cubin: CUDA_ERROR_NO_BINARY_FOR_GPU (209), made for another GPU",
        "kernels.ptx: CUDA_ERROR_INVALID_PTX (218): ptxas fake: what is this",
        "kernels.cu: NVRTC 12.2: NVRTC_ERROR_COMPILATION: kernels.cu(1): error: #error says the fake",
    ]
    assert not [call for call in done.calls if "cuMemAlloc" in call]


def test_no_nvrtc(fake: Fake, tmp_path: Path) -> None:
    done = fake.run(write_bundle(tmp_path / "b", kernels={"kernels.cu": ""}), XCEPTILE_NVRTC="/no/such/library.so")
    assert done.status == 2
    assert "kernels.cu: no NVRTC here to compile it (name the library in XCEPTILE_NVRTC)" in done.error


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"XCEPTILE_CUDA": "/no/such/driver.so"}, "no CUDA driver: /no/such/driver.so: cannot open shared object file"),
        ({"XCEPTILE_CUDA": "too_old.so"}, "too_old.so is too old: it has no cuFuncSetAttribute"),
        ({"FAKE_NO_DEVICE": "1"}, "the CUDA driver (12.6) finds no GPU"),
        ({"FAKE_FAIL_AT": "0", "FAKE_FAIL_CODE": "803"}, "are of two versions: restart the machine: "),
        (
            {"FAKE_FAIL_AT": str(OPENING.index("cuMemAlloc 2560")), "FAKE_FAIL_CODE": "2"},
            "Fake GPU?1 has no 2560 bytes for activations (1000 of 2000 are free): CUDA_ERROR_OUT_OF_MEMORY",
        ),
    ],
    ids=["no driver", "too old", "no device", "two versions", "no memory"],
)
def test_what_is_missing_is_said(fake: Fake, tmp_path: Path, environment: dict[str, str], said: str) -> None:
    settings = {k: str(fake.folder / v) if v == "too_old.so" else v for k, v in environment.items()}
    done = fake.run(write_bundle(tmp_path / "b"), **settings)
    assert done.status == 2
    assert said in done.error


def test_a_kernel_that_is_not_there(fake: Fake, tmp_path: Path) -> None:
    whole = plan()
    other = replace(whole, steps=(whole.steps[0], replace(whole.steps[1], kernel="nothing")))
    done = fake.run(write_bundle(tmp_path / "b", other))
    assert (done.status, "the kernels have no nothing" in done.error) == (2, True)


@pytest.mark.parametrize("taken", ["conv 2\nfold 2\n", "conv 4\nfold 2\n"], ids=["fewer", "more"])
def test_a_kernel_that_takes_other_arguments(fake: Fake, tmp_path: Path, taken: str) -> None:
    """Before CUDA 12.4 no driver can tell; what it then reads must be ours."""
    bundle = write_bundle(tmp_path / "b", functions=taken)
    done = fake.run(bundle)
    assert done.status == 2
    assert "step 0 (first) has 3 arguments, and its kernel conv takes others" in done.error
    assert fake.run(bundle, XCEPTILE_CUDA=str(fake.folder / "old.so")).status == 0


def test_a_driver_before_cuda_12_4_reads_no_more_than_is_there(fake: Fake, tmp_path: Path) -> None:
    """The last step's kernel takes as many parameters, each as large, as any kernel may: 32,764 bytes."""
    for taken in ("conv 3\nfold 32764\n", "conv 3\nfold 2 32764\n"):
        bundle = write_bundle(tmp_path / "b", functions=taken)
        done = fake.run(bundle, XCEPTILE_CUDA=str(fake.folder / "old.so"))
        assert (done.status, done.error) == (0, "")


@pytest.fixture(scope="module")
def compiled() -> dict[str, bytes]:
    """A small network of 600 bytes of input for a Jetson Orin."""
    build = Int8Builder("small")
    x = build.conv(build.input(photo(10, 20)), 16, (3, 3), relu=True)
    build.fully_connected(build.average_pool(build.conv(build.depthwise(x), 24)), 10)
    return cuda.build_files(build.graph(), catalog.get("jetson"))


@requires_module("nvidia.cuda_nvrtc", package="'xceptile[cuda]'")
@pytest.mark.parametrize("form", ["kernels.ptx", "kernels.cu"])
def test_a_compiled_network(fake: Fake, tmp_path: Path, compiled: dict[str, bytes], form: str) -> None:
    """What is compiled for a Jetson, as far as it goes without a GPU: the PTX, and the source through the real NVRTC
    with the runtime's own options. Every kernel gets as many pointers as it takes, each into the session's memory."""
    plan = unpack(compiled["plan.bin"])
    hashes = [hashlib.sha256(compiled[name]).hexdigest() for name in ("weights.bin", form)]
    files = {"plan.bin": pack(plan, *hashes), "weights.bin": compiled["weights.bin"], form: compiled[form]}
    bundle = tmp_path / "b"
    bundle.mkdir()
    for name, data in files.items():
        (bundle / name).write_bytes(data)
    library = Path(nvrtc.library_for("sm_87")[0]._name)
    settings = {"XCEPTILE_NVRTC": str(library), "LD_LIBRARY_PATH": str(library.parent)}
    done = fake.run(bundle, **settings, FAKE_INTEGRATED="1", ASAN_OPTIONS="detect_leaks=0")  # NVRTC leaks
    assert (done.status, done.error, len(done.output)) == (0, "", 10)
    assert not [call for call in done.calls if "captured" in call], "inputs and outputs lie where kernels reach them"
    launches = [call for call in done.calls if call.startswith("cuLaunchKernel")]
    assert [call.split()[1] for call in launches] == [step.kernel for step in plan.steps]
    assert [len(re.findall("device|host", call.split(": ")[1])) for call in launches] == [
        len(step.arguments) for step in plan.steps
    ]


# What may fail without harm: what is released; and the graph, without which kernels are launched one by one.
RELEASES = ("Destroy", "Free", "Unload", "Release", "PopCurrent", "nvrtcVersion", "ParamInfo")
GRAPH = ("Capture", "captured", "cuLaunchKernel", "RecordWithFlags", "GraphInstantiate")


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ((), {}),
        (TIMED, {}),
        (TIMED, {"FAKE_NO_CAPTURE": "1"}),
        ((), {"FAKE_CAPABILITY": "90", "FAKE_INTEGRATED": "1"}),
    ],
    ids=["graph", "timed", "timed, no graph", "from source, in place"],
)
def test_any_call_may_fail(fake: Fake, tmp_path: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
    """Each call in turn: nothing leaks or is freed twice, the exit status and the message say that it failed."""
    is_source, has_graph = "FAKE_CAPABILITY" in environment, "FAKE_NO_CAPTURE" not in environment
    form = "kernels.cu" if is_source else "kernels.cubin"  # just one, or the next would be tried
    bundle = write_bundle(tmp_path / "b", kernels={form: KERNELS[form]})
    calls = fake.run(bundle, *options, **environment).calls
    assert len(calls) > 35
    pushes, pushed = calls.count("cuCtxPushCurrent"), 0  # the last one is for closing
    numbers = {"FAKE_FAIL_AT": 0, "FAKE_NVRTC_FAIL_AT": 0}
    harmless = (*RELEASES, *(GRAPH if has_graph else GRAPH[:1]))
    for call in calls:
        which = "FAKE_NVRTC_FAIL_AT" if call.startswith("nvrtc") else "FAKE_FAIL_AT"
        done = fake.run(bundle, *options, **environment, **{which: str(numbers[which])})
        numbers[which] += 1
        assert "Sanitizer" not in done.error, f"{call}: {done.error}"
        pushed += call == "cuCtxPushCurrent"
        may_fail = any(word in call for word in harmless) or (pushed == pushes and "Push" in call)
        assert (done.status, bool(done.error)) == ((0, False) if may_fail else (2, True)), f"{call}: {done.error}"
        if not may_fail:
            assert re.search(r"CUDA_ERROR_FAKE \(999\)|NVRTC_ERROR_FAKE", done.error), f"{call}: {done.error}"
            assert options or done.output == b"", "a failed run writes no output"


@requires("qemu-aarch64", package="qemu-user")
def test_the_shipped_program_on_an_emulated_arm(fake: Fake, tmp_path: Path) -> None:
    """The same calls from the AArch64 program that a Jetson gets."""
    target = catalog.get("raspberry-pi-5")
    program = tmp_path / "xceptile-run"
    program.write_bytes(native_runtime.build(target)["xceptile-run"])
    program.chmod(0o755)
    zig = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17")
    compile_fakes(tmp_path, ("driver",), *zig)
    there = Fake(tmp_path, (*emulator_command(target), str(program)))
    bundle = write_bundle(tmp_path / "b")
    for environment in ({}, {"FAKE_INTEGRATED": "1"}, {"FAKE_CAPABILITY": "90"}):
        expected, got = fake.run(bundle, **environment), there.run(bundle, **environment)
        assert (got.status, got.calls, got.output) == (expected.status, expected.calls, expected.output)
        assert got.error == expected.error


def test_doctor_names_the_gpus(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_LOG", raising=False)
    monkeypatch.setenv("XCEPTILE_CUDA", str(fake.folder / "driver.so"))
    assert cuda_devices() == {"Fake GPU\t1": "8.7"}
    monkeypatch.setenv("FAKE_NO_DEVICE", "1")
    assert cuda_devices() == {}
    monkeypatch.setenv("XCEPTILE_CUDA", "/no/such/library.so")
    with pytest.raises(OSError, match="no/such"):
        cuda_devices()
