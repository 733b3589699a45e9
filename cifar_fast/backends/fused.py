"""The fused backend: our kernels, torch.compile for the rest, and on a GPU one CUDA graph per training step.

Everything that a step needs is on the device: the data set as bytes, the epoch's draws, the learning rate of each step,
and the step counters. ``train_step`` reads the step counter, trains on the batch with that number, stores the losses,
increments the counter and loads the next learning rate. It exchanges nothing with the host, so one captured graph is
replayed for every step. Per epoch the host uploads only the random draws. On a CPU the same function is called
directly, and its kernels are compiled C++ or, under Triton's interpreter, interpreted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast.backends.base import Backend, Step, autocast, compile_loss_fn, warm_up_draws
from cifar_fast.backends.optimizers import make_optimizer
from cifar_fast.data.augment import Draws
from cifar_fast.kernels import BatchNormAct2d, StepState, augment, cpu, cross_entropy, fuse_norms, record
from cifar_fast.kernels.launch import native
from cifar_fast.model import CNN, build_model, loss_dtype, parameter_dtype, start_epoch
from cifar_fast.recipe import IMAGE_CHANNELS, Recipe
from cifar_fast.whitened import Whitened

PADDED_CHANNELS = 8
"""Channels of a batch: three colors, then zeros. A pixel in half precision is then one 128-bit access, which tensor
cores prefer. Not chosen by measurement yet; 3 and 4 are the alternatives.
"""

WARM_UP_CALLS = 3
"""Calls before a capture. The first compiles. The others let cuDNN choose its algorithms and the allocator reach its
final size.
"""


class Fused(Backend):
    """The same network with fused kernels. The weights and their names are those of the plain model.

    A custom model stays as it is. Only augmentation and loss then use our kernels; the compiler does the rest. On a CPU
    nothing is compiled by torch, which would make the convolutions' neighbors slower.
    """

    name = "fused"

    def _set_up(self) -> None:
        recipe, data, device, dtype, custom_model = self.recipe, self.data, self.device, self.dtype, self.custom_model
        n, size = len(data.train_images), recipe.batch_size
        self.steps = n // size
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.native = native(device)
        self.compiles = not self.native
        self.channels = IMAGE_CHANNELS if custom_model or self.native else PADDED_CHANNELS
        self.table = data.normalization.table(dtype)
        self.evaluated_images = None
        if not self.native:
            images = data.normalization.apply(data.evaluated_images, parameter_dtype(dtype))
            self.evaluated_images = F.pad(images, (0, self.channels - IMAGE_CHANNELS)).permute(0, 3, 1, 2)
        self.draws = warm_up_draws(n, device)
        schedule = torch.tensor(recipe.learning_rates(self.steps), dtype=torch.float32, device=device)
        self.state = StepState.initial(schedule, self.steps, size, loss_dtype(dtype))
        count = len(data.evaluated_images)
        self.evaluated = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)

        # The compiled code and the graphs hold this model's tensors. Each run copies its weights into them.
        self.model = build_model(
            recipe,
            data.num_classes,
            device,
            dtype,
            custom_model,
            change=functools.partial(fuse, channels=self.channels),
        )
        self.model.to(memory_format=self.memory_format)
        if custom_model is None and not any(isinstance(layer, BatchNormAct2d) for layer in self.model.modules()):
            self.notes = ["fused: this recipe has no batch norm, so its kernel is not used"]
        if self.native and (reason := cpu.unavailable_reason(dtype)):
            self.notes = [*self.notes, f"fused: plain torch computes what its C++ kernels would compute ({reason})"]
        outputs, scale = (
            (self.model, 1.0) if custom_model else (cast("CNN | Whitened", self.model).outputs, recipe.output_scale)
        )
        self.loss_grad_fn = make_loss_grad_fn(outputs, scale, recipe, device)
        if not self.native:
            self.loss_grad_fn = compile_loss_fn(self.loss_grad_fn)
        # torch 2.11's fused SGD is wrong in half precision on a CPU.
        fused_sgd = device.type == "cuda" or parameter_dtype(dtype) == torch.float32
        self.optimizer = make_optimizer(self.model, recipe, lr=self.state.lr, fused=fused_sgd)
        for parameter in self.model.parameters():
            # A captured step must not allocate momentum. Starting from zeros equals SGD's lazy start (dampening 0).
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.seek(0)
        self.step_graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}
        phases = {start_epoch(self.model, epoch): epoch for epoch in reversed(range(recipe.epochs))}
        for phase, epoch in phases.items():
            start_epoch(self.model, epoch)
            self.step_graphs[phase] = self._capture(self.train_step)
        self.evaluation_graph = self._capture(self.eval_step)

    def reset(self, model: nn.Module) -> None:
        super().reset(model)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.seek(0)

    def begin_epoch(self, draws: Draws) -> Step:
        n = draws.tensor.shape[1]
        self.draws.tensor[:, :n].copy_(draws.tensor)
        epoch = self.epoch % self.recipe.epochs
        graph = self.step_graphs[start_epoch(self.model, epoch)]
        self.seek(epoch * self.steps)
        self.epoch += 1

        def step(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            graph.replay() if graph else self.train_step()
            return self.state.losses[i], self.state.correct[i]

        return step

    def rewind(self, step: int) -> None:
        self.seek((self.epoch - 1) % self.recipe.epochs * self.steps + step, step)

    def batch(self, draws: Draws, step: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of ``draws``, or batch number ``step`` (on the device) of an epoch's draws."""
        images, labels = augment(
            self.data.train_images,
            draws.tensor,
            self.table,
            labels=self.data.train_labels,
            step=step,
            batch_size=None if step is None else self.recipe.batch_size,
            out_channels=self.channels,
            padding=self.recipe.crop_padding,
            cutout_size=self.recipe.cutout_size,
            both_sides=self.recipe.crop_both_sides,
        )
        assert labels is not None
        return images, labels

    def evaluate(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.evaluation_graph.replay() if self.evaluation_graph else self.eval_step()
        return self.evaluated

    def seek(self, global_step: int, epoch_step: int = 0) -> None:
        """Prepare the step that follows ``global_step`` steps of the run and ``epoch_step`` steps of its epoch."""
        self.state.global_step.fill_(global_step)
        self.state.epoch_step.fill_(epoch_step)
        self.state.lr.copy_(self.state.schedule[global_step])

    def train_step(self) -> None:
        """Run the training step whose number is on the device. This is the function that is captured."""
        self.model.train()
        images, labels = self.batch(self.draws, self.state.epoch_step)
        outputs, loss, correct, gradient = self.loss_grad_fn(images, labels)
        self.model.zero_grad()
        outputs.backward(gradient)
        self.optimizer.step()
        record(loss.to(self.state.losses.dtype), correct, self.state)  # a custom model may return another dtype

    def eval_step(self) -> None:
        """Evaluate all images that are not trained on. This is the function that is captured."""
        batch_size = self.recipe.batch_size
        if not self.native:
            batch_size = evaluation_batch_size(len(self.data.evaluated_images), batch_size)
        scores = self._evaluate_in_batches(lambda *batch: self.loss_grad_fn(*batch)[1:3], batch_size)
        for kept, values in zip(self.evaluated, scores):
            kept.copy_(values)

    def _evaluated_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        if self.evaluated_images is None:
            yield from super()._evaluated_batches(batch_size)
        else:
            for images in self.evaluated_images.split(batch_size):
                yield images.clone() if self.custom_model else images

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Call ``function`` until nothing is left to compile or choose. On a GPU, return the graph of one call."""
        if self.stream is None:  # no GPU
            function()
            return None
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(before)
        first_error = None
        with fastest_deterministic_convolutions():
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM_UP_CALLS):
                        self.seek(0)  # a run may have fewer steps than calls
                        function()
                before.wait_stream(self.stream)
                # Capture on the stream of the warm-up and share its workspaces. The default capture stream belongs to
                # the GPU of the process's first capture.
                with torch.cuda.graph(graph, stream=self.stream):
                    try:
                        function()
                    except Exception as error:
                        first_error = error
                        raise
            except Exception as error:
                reset_after_failed_capture(before)
                raise first_error or error from None
        return graph


def evaluation_batch_size(n: int, batch_size: int) -> int:
    """Return the number of images per batch in an evaluation of ``n`` images, about four training batches.

    The batches are equal if ``n`` allows it, because each size is compiled separately.
    """
    return -(-n // -(-n // (4 * batch_size)))


def reset_after_failed_capture(stream: torch.cuda.Stream) -> None:
    """Make ``stream`` current again after a failed capture, which leaves its own stream current.

    After a failed capture in torch 2.11, the GPU's generator still behaves as if a capture were active, and draws no
    more numbers. A capture that succeeds resets it.
    """
    torch.cuda.set_stream(stream)
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    # If the GPU accepts no more work, the first error is the one to report.
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        torch.zeros(1, device=stream.device)
    torch.cuda.set_stream(stream)


def make_loss_grad_fn(
    model: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    recipe: Recipe,
    device: torch.device,
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return a function of images ``[B, C, S, S]`` and labels ``[B]``. Logits are outputs of ``model`` times ``scale``.

    It returns the outputs ``[B, classes]``, the losses ``[B]``, a bool tensor of the correct predictions ``[B]``, and
    the gradient of the sum of the losses with respect to the outputs.
    """

    def loss_grad_fn(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with autocast(device, images.dtype):
            outputs = model(images).contiguous()
        return outputs, *cross_entropy(outputs, labels, label_smoothing=recipe.label_smoothing, scale=scale)

    return loss_grad_fn


def fuse(model: nn.Module, channels: int = PADDED_CHANNELS) -> nn.Module:
    """Replace each (max-pool,) batch norm and activation of ``model`` by one operator, in place, and return ``model``.

    The result takes images with ``channels`` channels. Modules keep their indices, so the names in the state dict do
    not change.
    """
    fuse_norms(model)
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    pools = [name for name, layer in model.named_modules() if isinstance(layer, nn.MaxPool2d)]
    model.set_submodule(pools[-1], GlobalMaxPool2d())  # before flatten and linear
    name, first = next(iter(convolutions.items()))
    if channels > first.in_channels:
        model.set_submodule(name, PaddedConv2d(first, channels))
    return model


class GlobalMaxPool2d(nn.Module):
    """The maximum over all pixels of each channel, ``[N, C, 1, 1]``; the gradient goes to the first of equal pixels.

    The compiler turns this module into one pass forward and one backward. It would turn torch's own backward pass into
    three passes with atomics.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, C], the order in memory, also of the gradient
        first = pixels.argmax(dim=1, keepdim=True)
        chosen = torch.arange(pixels.shape[1], device=x.device)[:, None] == first
        return torch.where(chosen, pixels, 0).sum(dim=1)[..., None, None]


class PaddedConv2d(nn.Conv2d):
    """A convolution for images that are padded with channels of zeros; its weight has zeros for them.

    These weights stay zero in training, because their gradient is zero. The state dict holds the weight of the
    original convolution.
    """

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        geometry: dict[str, Any] = dict(kernel_size=conv.kernel_size, padding=conv.padding)
        super().__init__(channels, conv.out_channels, **geometry, bias=False, device="meta")
        self.in_channels = conv.in_channels
        self.weight = nn.Parameter(self.pad(conv.weight.detach()), requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        self.register_state_dict_post_hook(self._remove_padding)
        self.register_load_state_dict_pre_hook(self._add_padding)

    def pad(self, weight: torch.Tensor) -> torch.Tensor:
        """Append zeros for the padding channels to ``weight`` ``[out, in, height, width]``."""
        return F.pad(weight, (0, 0, 0, 0, 0, self.weight.shape[1] - weight.shape[1]))

    @staticmethod
    def _remove_padding(
        module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]
    ) -> None:
        assert isinstance(module, PaddedConv2d)
        name = f"{prefix}weight"
        state_dict[name] = state_dict[name][:, : module.in_channels].contiguous()

    @staticmethod
    def _add_padding(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        assert isinstance(module, PaddedConv2d)
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict[name] = module.pad(state_dict[name])


@contextlib.contextmanager
def fastest_deterministic_convolutions() -> Iterator[None]:
    """Let cuDNN time its deterministic algorithms and use the fastest for each shape."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark = cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
