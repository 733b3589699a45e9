"""The choice of a backend, its construction with fallbacks, and the cache of built backends."""

import dataclasses
import gc
import weakref

import pytest
import torch

from cifar_fast import InputError, Recipe, fit
from cifar_fast.backends.eager import Eager
from cifar_fast.backends.select import BackendCache, BackendConfig, build_backend, local_device, resolve_backend
from cifar_fast.data.tensors import device_data
from cifar_fast.kernels import cpu
from cifar_fast.model import CustomModel
from cifar_fast.utils.device import fused_unavailable_reason
from cifar_fast.utils.errors import with_flags
from cifar_fast.utils.progress import lines_to
from tests.helpers import NARROW, fit_with

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=1, batch_size=32, widths=NARROW)


def config(*backends, device=CPU):
    return BackendConfig(backends, device, torch.float32, torch.channels_last, "as on a GPU")


def test_auto_on_a_cpu_is_fused_unless_its_kernels_would_be_slow(monkeypatch, tmp_path):
    def choice(**options):
        resolved = resolve_backend(device="cpu", dtype="float32", **options)
        return resolved.backends, resolved.reason

    assert choice()[0] == ("eager",) and "TRITON_INTERPRET=1 is set" in choice()[1]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choice()[0] == ("fused", "eager") and "fused was measured fastest on a CPU" in choice()[1]
    assert choice(memory_format="contiguous_format")[0] == ("eager",)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path))
    cpu.forget()
    try:
        assert choice()[0] == ("eager",) and "no-compiler" in choice()[1]
    finally:
        cpu.forget()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, dict(activation="gelu"), dict(residual=True), dict(batch_norm=False)])
def test_fused_on_a_cpu_trains_as_eager_does(small, monkeypatch, dtype, options):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    recipe, how = dataclasses.replace(RECIPE, **options), dict(device="cpu", dtype=dtype, seed=3, log=None)
    how |= dict(memory_format="channels_last")
    fused, eager = (fit(recipe, small, backend=name, **how) for name in ("fused", "eager"))
    rows = zip(fused.rows, eager.rows, strict=True)
    assert all(mine.train_loss == pytest.approx(its.train_loss, rel=0.05) for mine, its in rows)
    assert fused.config.backend == "fused"


def test_fused_in_contiguous_format_is_refused_with_the_option():
    with pytest.raises(InputError) as caught:
        resolve_backend("fused", memory_format="contiguous_format")
    assert "kernels need memory_format channels_last" in str(caught.value)
    assert "kernels need --memory-format channels_last" in with_flags(caught.value.message)


def test_old_gpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert fused_unavailable_reason(torch.device("cuda")) == "a GPU of compute capability 6.1, and its kernels need 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fused_unavailable_reason(torch.device("cuda")) is None


def on_hip(patch):
    patch.setattr(torch.version, "hip", "6.4")


def without_triton(patch):
    patch.setattr("cifar_fast.kernels.launch.MISSING", "Triton cannot be imported: it is not here")


def on_an_old_card(patch):
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (on_hip, "its kernels are written for NVIDIA GPUs, not AMD"),
        (without_triton, "Triton cannot be imported: it is not here"),
        (on_an_old_card, "a GPU of compute capability 7.0, and its kernels need 7.5"),
    ],
)
def test_auto_avoids_fused_on_other_gpus(monkeypatch, situation, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    situation(monkeypatch)
    chosen = resolve_backend("auto")
    assert chosen.backends == ("compiled", "eager") and chosen.device.type == "cuda"
    assert (
        f"the fused backend cannot run here ({reason}" in chosen.reason
        and "so compiled is used instead" in chosen.reason
    )
    with pytest.raises(InputError, match=r"the fused backend cannot run here .*; choose backend"):
        resolve_backend("fused")


def test_auto_says_that_there_is_no_usable_gpu(monkeypatch):
    """A driver that is too old for this torch, or an empty CUDA_VISIBLE_DEVICES, makes the GPU unusable."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = resolve_backend("auto")
    assert chosen.backends == ("eager",) and chosen.reason.startswith("no CUDA GPU is here")


def test_auto_falls_back_to_the_next_backend_and_logs_it(small, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    lines = []
    with lines_to(lines.append):
        backend, failures = build_backend(config("fused", "compiled", "eager"), RECIPE, device_data(small, CPU))
    assert backend.name == "eager"
    assert failures == [
        "the fused backend cannot be set up here (RuntimeError: no compiler), so compiled is used instead",
        "the compiled backend cannot be set up here (RuntimeError: no compiler), so eager is used instead",
    ]
    assert [line for line in lines if "cannot be set up" in line] == [f"auto: {failure}" for failure in failures]


def test_failed_backends_leave_no_trace_in_the_training(small, monkeypatch):

    def broken(*args, **how):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    result = fit_with(config("fused", "compiled", "eager"), RECIPE, small)
    failures = [f"the {name} backend cannot be set up here" for name in ("fused", "compiled")]
    assert result.backend == "eager" and result.summary()["auto"][0] == "as on a GPU"
    assert all(line.startswith(failure) for line, failure in zip(result.auto[1:], failures, strict=True))
    alone = fit(RECIPE, small, backend="eager", device="cpu", dtype="float32", memory_format="channels_last", log=None)
    assert [row.train_loss for row in result.rows] == [row.train_loss for row in alone.rows]


def test_out_of_memory_in_the_last_backend_names_what_needs_it(small, monkeypatch):
    def out_of_memory(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    reasons = {
        "eager": "(out of memory for the weights of the network); choose smaller --widths, or free memory",
        "compiled": "(out of memory at --batch-size 32); choose a smaller one, or another --backend",
    }
    monkeypatch.setattr(Eager, "__init__", out_of_memory)
    for name, reason in reasons.items():
        with pytest.raises(InputError) as caught:
            build_backend(config(name), RECIPE, device_data(small, CPU))
        assert with_flags(caught.value.message) == f"the {name} backend cannot be set up here {reason}"


def test_each_rank_gets_its_gpu_unless_a_device_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    any_gpu = config("eager", device=torch.device("cuda"))
    assert local_device(any_gpu, 8, 1, "auto").device == torch.device("cuda", 1)
    assert local_device(any_gpu, 8, 1, "cuda:0") is any_gpu and local_device(any_gpu, 1, 0, "auto") is any_gpu
    assert local_device(config("eager"), 8, 1, "auto").device == CPU
    with pytest.raises(InputError, match=r"more processes than GPUs, 2 on this machine; .* choose device cpu"):
        local_device(any_gpu, 8, 2, "cuda")


# Three convolutions of one channel: a backend is built in milliseconds.
TINY = Recipe(epochs=1, batch_size=32, widths=(1, 1, 1))
WIDER = dataclasses.replace(TINY, widths=(2, 2, 2))


def test_cache_keeps_compiled_backends_and_the_last_eager_one(small, uncompiled):
    cache, uploads = BackendCache(), []

    def make_data():
        uploads.append(device_data(small, CPU))
        return uploads[-1]

    eager, compiled = config("eager"), config("compiled")
    first, failures = cache.get(eager, TINY, make_data)
    assert cache.get(eager, TINY, make_data)[0] is first and len(uploads) == 1 and failures == []
    assert first.name == "eager" and first.data is uploads[0]

    second = cache.get(compiled, TINY, make_data)[0]
    third = cache.get(compiled, WIDER, make_data)[0]
    assert [second.recipe, third.recipe] == [TINY, WIDER] and len(uploads) == 3
    assert cache.get(compiled, TINY, make_data)[0] is second and cache.get(compiled, WIDER, make_data)[0] is third
    assert cache.get(eager, TINY, make_data)[0] is not first and len(uploads) == 4


def test_cache_keeps_one_backend_that_needs_no_compiler(small, monkeypatch):
    """The memory of a sweep on a CPU would otherwise grow with its variants."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cache = BackendCache()
    recipes = [dataclasses.replace(TINY, momentum=momentum) for momentum in (0.1, 0.2, 0.3)]
    built = [weakref.ref(cache.get(config("fused"), one, lambda: device_data(small, CPU))[0]) for one in recipes]
    gc.collect()
    assert [one() is None for one in built] == [True, True, False]


def test_cache_tells_custom_models_apart(small):
    def make_model():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))

    cache, own = BackendCache(), CustomModel(make_model)
    made = [cache.get(config("eager"), TINY, lambda: device_data(small, CPU), model)[0] for model in (None, own, own)]
    assert made[0] is not made[1] and made[1] is made[2] and isinstance(made[1].model, torch.nn.Sequential)


@pytest.mark.parametrize("free", [30, 70])
def test_cache_drops_everything_when_half_of_the_gpu_is_used(small, uncompiled, monkeypatch, free):
    """The GPU's memory is what the test says; the backends are on the CPU."""
    cache = BackendCache()
    kept = cache.get(config("compiled"), TINY, lambda: device_data(small, CPU))[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(RuntimeError, match="no data"):
        cache.get(config("compiled", device=torch.device("cuda")), TINY, no_data)
    again = cache.get(config("compiled"), TINY, lambda: device_data(small, CPU))[0]
    assert (again is kept) == (free == 70)


def no_data():
    raise RuntimeError("no data")
