"""Ways to run the recipe: small objects with the same four methods, and the choice among them.

``prepare(model)`` takes the weights of a fresh model, ``train_epoch(epoch, draws, on_step)`` and
``evaluate()`` return per-picture tensors on the device, ``state_dict()`` the weights under the names
of the plain model. Set-up that is worth keeping is done once and serves every later ``prepare``.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cifar_fast.augment import Draws, augment
from cifar_fast.data import Dataset
from cifar_fast.errors import InputError
from cifar_fast.model import CNN, loss_and_correct
from cifar_fast.recipe import Recipe

OnStep = Callable[[int, torch.Tensor], None]
"""Called after each step with its number, counted from 1 over the whole run, and its losses ``[batch_size]``."""

DTYPES = ("float16", "bfloat16", "float32")


class Eager:
    """The reference: the same operations on the same numbers in the same order.

    float16 and float32 hold everything in that type, as the reference does: weights, batch norm,
    momentum. bfloat16, which has too few bits to add a small step to a weight, is the type of the
    activations and convolutions alone (autocast); weights and their updates are float32.
    """

    name = "eager"

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> None:
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.autocast = dtype == torch.bfloat16
        self.train_images, self.test_images = normalize(dataset, device, dtype)
        self.train_labels = torch.from_numpy(dataset.train_labels).to(device)
        self.test_labels = torch.from_numpy(dataset.test_labels).to(device)
        self.score = self._score

    def prepare(self, model: CNN) -> None:
        """Start a run from the weights of ``model``."""
        self.model = model.to(torch.float32 if self.autocast else self.dtype).to(self.device)
        self._new_optimizer()

    def train_epoch(self, epoch: int, draws: Draws, on_step: OnStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Train epoch number ``epoch``, from 0; gives the loss of each picture trained on, and 100 where it was right."""
        size, steps = self.recipe.batch_size, len(draws) // self.recipe.batch_size
        losses, corrects = [], []
        self.model.train()
        for i in range(steps):
            step = epoch * steps + i + 1
            self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate(step, steps)
            batch = draws.slice(i * size, (i + 1) * size)
            loss, correct = self.score(augment(self.train_images, batch, self.recipe), self.train_labels[batch.permutation])
            self.model.zero_grad()
            loss.sum().backward()
            self.optimizer.step()
            losses.append(loss.detach())
            corrects.append(correct)
            on_step(step, losses[-1])
        return torch.cat(losses), torch.cat(corrects)

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """For each test picture, 100 where the model is right and 0 where it is not."""
        self.model.eval()
        batches = zip(self.test_images.permute(0, 3, 1, 2).split(self.recipe.batch_size), self.test_labels.split(self.recipe.batch_size))
        return torch.cat([self.score(images, labels)[1] for images, labels in batches])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def _score(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return loss_and_correct(self.model(images), labels, self.recipe)

    def _new_optimizer(self) -> None:
        recipe = self.recipe
        weight_decay = recipe.weight_decay * recipe.batch_size
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0, momentum=recipe.momentum, weight_decay=weight_decay, nesterov=True)


class Compiled(Eager):
    """The same model in channels_last under torch.compile, with the compiler's own kernels alone."""

    name = "compiled"
    model: CNN | None = None

    def prepare(self, model: CNN) -> None:
        if self.model is not None:  # what is compiled refers to this model: it stays, its numbers change
            self.model.load_state_dict(model.state_dict())
            self._new_optimizer()
            return
        super().prepare(model.to(memory_format=torch.channels_last))
        torch.compiler.reset()  # graphs of an earlier instance would count against the limit of recompilations
        self.score = torch.compile(self._score, dynamic=False)
        self._compile()

    def _compile(self) -> None:
        """Compile for each shape that a run meets, and leave weights, statistics and gradients as they were."""
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        size = self.recipe.batch_size
        self.model.train()
        first = torch.arange(size, device=self.device)
        still = Draws(first, torch.zeros_like(first), torch.ones_like(first), torch.zeros_like(first))
        self.score(augment(self.train_images, still, self.recipe), self.train_labels[:size])[0].sum().backward()
        self.model.zero_grad()
        self.evaluate()
        self.model.load_state_dict(before)


BACKENDS = {"eager": Eager, "compiled": Compiled}


def normalize(dataset: Dataset, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test pictures ``[N, 32, 32, 3]`` as ``dtype`` on ``device``, less the mean, over the standard deviation.

    Both are those of the training pictures' 0..255 values, a channel each, the deviation with N - 1.
    """
    train, test = (torch.tensor(images, device=device) for images in (dataset.train_images, dataset.test_images))
    std, mean = torch.std_mean(train.float(), dim=(0, 1, 2), unbiased=True, keepdim=True)
    if not std.all():
        raise InputError(f"{dataset.source}: a colour channel of train_images has the same value everywhere; it cannot be normalised")
    return ((train - mean) / std).to(dtype), ((test - mean) / std).to(dtype)


@dataclass(frozen=True)
class Choice:
    """What is to run, and in ``reason`` why, where that was left to us."""

    backend: type[Eager]
    device: torch.device
    dtype: torch.dtype
    reason: str


def choose(backend: str = "auto", device: str = "auto", dtype: str = "auto") -> Choice:
    """Settle what ``auto`` means here; :class:`InputError` for what cannot work here."""
    if backend not in ("auto", "fused", *BACKENDS):
        raise InputError(f"unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}, fused")
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"unknown dtype {dtype!r}; there are auto, {', '.join(DTYPES)}")
    if backend == "fused":
        raise InputError("the fused backend does not exist yet: its kernels are still to come; use --backend auto, eager or compiled")
    reasons = []

    where = _device(device)
    if device == "auto":
        reasons.append("a GPU is here" if where.type == "cuda" else "no CUDA GPU is here")

    if dtype == "float16" and where.type == "cpu":
        raise InputError("--dtype float16 needs a GPU (on a CPU torch has no fast float16 convolutions); use bfloat16 or float32")
    if dtype == "auto" and where.type == "cuda":
        dtype = "float16"
        reasons.append("float16 as the reference")
    elif dtype == "auto":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
        reasons.append("this CPU computes in bfloat16" if dtype == "bfloat16" else "this CPU has no bfloat16 arithmetic")

    if backend == "auto" and where.type == "cpu":
        backend = "eager"
        reasons.append("eager was measured faster than compiled on a CPU")
    elif backend == "auto":
        backend, trouble = "compiled", compile_trouble(where)
        if trouble:
            backend = "eager"
            reasons.append(f"torch.compile does not work here ({trouble})")
        else:
            reasons.append("torch.compile works")
    elif backend == "compiled" and (trouble := compile_trouble(where)):
        raise InputError(f"torch.compile does not work here ({trouble}); install a C++ compiler, or use --backend eager")
    return Choice(BACKENDS[backend], where, getattr(torch, dtype), "; ".join(reasons))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"unknown device {name!r}; there are auto, cpu, cuda, cuda:0, cuda:1, ...")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"--device {name}: no CUDA GPU is here that this torch can use; try --device cpu")
        if device.index is not None and device.index >= count:
            raise InputError(f"--device {name}: there are {count} CUDA GPUs here, counted from 0")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16, AMX, or Arm's BF16)."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def compile_trouble(device: torch.device) -> str | None:
    """Why torch.compile does not work on ``device``; None where it does."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no Triton, an old GPU: each layer below raises its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of handing it back to the system.

    A CPU step frees and allocates its activations, hundreds of megabytes, and each fresh page costs a
    fault: measured at 15 to 30 % of a step. Only glibc has the call; elsewhere nothing happens. It
    holds for the whole process, whose memory then stays at its peak.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, -1)
