"""Generated calls of each operator on a CPU, right and wrong ones, compared with plain torch in float64.

    python -m tests.kernels.misuse --calls 2000

A call starts from arguments that are right. Up to three changes then spoil some of them: other types, dtypes, shapes,
strides, offsets, devices or values, shared memory, gradients. The operator must give what plain torch gives, or raise
one line that names an argument and leave all tensors as they were. Nothing outside a changed tensor may be written:
each tensor lies in a larger piece of memory, which is compared as well.
"""

import argparse
import collections
import inspect
import math
import re
import time

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from cifar_fast.kernels import StepState, augment, batch_norm_act, cross_entropy, record
from cifar_fast.kernels.augment import augment_reference, crop_offsets
from cifar_fast.kernels.batch_norm_act import ACTIVATIONS, batch_norm_act_reference
from cifar_fast.kernels.record_step import record_reference

HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-5, torch.float64: 1e-6}
DTYPES = (*TOLERANCE, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NUMBERS = (None, "1", math.nan, math.inf, -1, 0, 0.5, 1, 1.0, 3, 2**40, True, [1], torch.ones(1))
ERRORS = (TypeError, ValueError, IndexError, RuntimeError)
TORCHS = ("a leaf Variable that requires grad is being used in an in-place operation",)
"""Errors that torch itself raises."""
GUARD = 64
"""Bytes around each tensor."""


class Placed:
    """A copy of a dense tensor with other bytes around it. Its address is ``shift`` bytes off a multiple of 64."""

    def __init__(self, tensor, shift):
        size = tensor.numel() * tensor.element_size()
        self.memory = bytearray(b"\xa5" * (4 * GUARD + size))
        self.begin = 2 * GUARD - torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % GUARD + shift
        self.end = self.begin + size
        flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.begin)
        self.tensor = torch.as_strided(flat, tensor.shape, tensor.stride()).copy_(tensor.detach())
        self.tensor.requires_grad_(tensor.requires_grad)

    def intact(self):
        """Return whether the bytes around the tensor are as they were."""
        return {*self.memory[: self.begin], *self.memory[self.end :]} == {0xA5}


def dense(tensor):
    """Return whether the elements of a tensor on the CPU lie side by side in memory."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_neg()
    return plain and tensor.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def spoil(draw, value, others):
    """Return another value for the argument ``value``; ``others`` are the tensors of the call."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return draw(st.sampled_from(NUMBERS))
    change, t = draw(st.sampled_from(CHANGES)), value.detach()
    return change(draw, t, others)


def other_shape(draw, t, _):
    kinds = ("unsqueeze", "flatten", "repeat", "narrow", "empty")
    kind, dim = draw(st.sampled_from(kinds)), draw(st.integers(0, max(t.dim() - 1, 0)))
    if kind == "unsqueeze" or t.dim() == 0:
        return t.unsqueeze(0)
    if kind == "flatten":
        return t.flatten()
    if kind == "repeat":
        return torch.cat((t, t), dim)
    return t.narrow(dim, 0, 0 if kind == "empty" else max(t.shape[dim] - 1, 0))


def other_strides(draw, t, _):
    kind = draw(st.sampled_from(("transposed", "every other", "expanded", "contiguous")))
    if t.dim() == 0 or kind == "contiguous":
        return t.contiguous()
    dim = draw(st.integers(0, t.dim() - 1))
    if kind == "transposed":
        return t.transpose(dim, -1).contiguous().transpose(dim, -1)
    if kind == "every other":
        return torch.repeat_interleave(t, 2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    return t.narrow(dim, 0, min(1, t.shape[dim])).expand_as(t) if t.shape[dim] else t


def other_values(draw, t, _):
    t = t.clone()
    if t.numel():
        place = draw(st.integers(0, t.numel() - 1))
        bad = (math.nan, math.inf, -math.inf) if t.is_floating_point() else (-1, 10, 99, 2**40, -(2**40), 2**63 - 1)
        value = draw(st.sampled_from(bad))
        if t.dtype == torch.int64 or t.is_floating_point():
            t[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), t.shape))] = value
    return t


def shared_memory(draw, t, others):
    other = draw(st.sampled_from(others))
    if other.dtype == t.dtype and other.numel() >= t.numel() and dense(other):
        flat = torch.as_strided(other, (other.numel(),), (1,))  # its memory, in the order of addresses
        start = draw(st.integers(0, other.numel() - t.numel()))
        return torch.as_strided(flat, t.shape, t.stride(), flat.storage_offset() + start) if dense(t) else other
    return other


CHANGES = (
    lambda draw, t, _: draw(st.sampled_from((None, 3, "none", t.tolist() if t.device.type == "cpu" else [1], object))),
    lambda draw, t, _: t.to(draw(st.sampled_from(DTYPES))),
    other_shape,
    other_strides,
    other_values,
    shared_memory,
    lambda draw, t, _: t.to("meta"),
    lambda draw, t, _: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda draw, t, _: nn.Parameter(t.clone()) if t.is_floating_point() else t,
    lambda draw, t, _: (-t)._neg_view() if t.is_floating_point() else t,
    lambda draw, t, _: t.to_sparse() if t.device.type == "cpu" else t,
)


def tensor_of(draw, shape, dtype, low=None, high=None):
    """Return a random tensor: integers from ``low`` to ``high`` - 1, or normal values."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if low is not None:
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


class Norm:
    """``batch_norm_act``."""

    operator = staticmethod(batch_norm_act)
    changes = ("running_mean", "running_var", "num_batches_tracked")

    @staticmethod
    def arguments(draw):
        n, channels = draw(st.integers(0, 3)), draw(st.integers(1, 19))
        height, width = draw(st.integers(2, 7)), draw(st.integers(2, 7))
        of = {name: draw(st.sampled_from(tuple(TOLERANCE))) for name in ("weight", "bias", "running_mean")}
        x = tensor_of(draw, (n, channels, height, width), draw(st.sampled_from(tuple(TOLERANCE))))
        given = dict(x=x.contiguous(memory_format=torch.channels_last))
        given |= {name: tensor_of(draw, (channels,), dtype) for name, dtype in of.items()}
        given["running_var"] = tensor_of(draw, (channels,), of["running_mean"]).abs() + 0.1
        training, tracked = draw(st.booleans()), draw(st.booleans())
        if training and not tracked:
            given |= dict(running_mean=None, running_var=None)
        for name in ("weight", "bias"):
            if draw(st.integers(0, 4)) == 0:
                given[name] = None
        given["num_batches_tracked"] = torch.tensor(7) if draw(st.booleans()) else None
        number = draw(st.sampled_from((0.1, 0, 1, 0.3)))
        given |= dict(
            training=training,
            activation=draw(st.sampled_from(ACTIVATIONS)),
            alpha=draw(st.sampled_from((0.075, 1.0, 3))),
            momentum=torch.tensor(number, dtype=torch.float64) if draw(st.integers(0, 4)) == 0 else number,
            eps=draw(st.sampled_from((1e-5, 1e-3, 1))),
            pool=draw(st.sampled_from((1, 2))),
        )
        for name in ("x", "weight", "bias"):
            if given[name] is not None and draw(st.booleans()):
                given[name] = given[name].requires_grad_()
        return given

    @staticmethod
    def ours(given):
        y = batch_norm_act(**given)
        results = dict(y=y.detach())
        wanted = {name: given[name] for name in ("x", "weight", "bias") if getattr(given[name], "requires_grad", False)}
        if wanted and y.device.type != "meta":
            dy = weights_of(y)
            grads = torch.autograd.grad(y, list(wanted.values()), dy)
            results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads)}
        return results

    @staticmethod
    def plain(given):
        """Return the results, and by name the size of the values that cancel in them."""
        given, momentum, count = dict(given), given["momentum"], given["num_batches_tracked"]
        given["momentum"] = momentum.item() if torch.is_tensor(momentum) else momentum
        if given.pop("num_batches_tracked") is not None and given["training"] and not torch.is_tensor(momentum):
            count += 1
        wanted = {name: given[name] for name in ("x", "weight", "bias") if getattr(given[name], "requires_grad", False)}
        y = batch_norm_act_reference(**given)
        results, scales = dict(y=y.detach()), {}
        if wanted:
            dy = weights_of(y)
            grads = torch.autograd.grad(y, list(wanted.values()), dy)
            results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads)}
        if wanted and len(y):
            x, channels = given["x"].detach(), given["x"].shape[1]
            pooled = torch.nn.functional.max_pool2d(x, given["pool"])
            var = pooled.var((0, 2, 3), unbiased=False) if given["training"] else given["running_var"]
            weight = torch.ones(channels) if given["weight"] is None else given["weight"].detach()
            steepest = ((var + given["eps"]).rsqrt() * weight.abs()).nan_to_num(0, 0, 0)
            scales["gradient of x"] = 4 * float(steepest.detach().max())
            scales["gradient of weight"] = scales["gradient of bias"] = 4 * pooled.numel() / channels
        return results, scales


def weights_of(y):
    """Return fixed weights between -1 and 1 for the elements of ``y``, exact in each dtype."""
    return ((torch.arange(y.numel()) * 37 % 65 - 32) / 32).view(y.shape).to(y.dtype)


class CrossEntropy:
    """``cross_entropy``."""

    operator = staticmethod(cross_entropy)
    changes = ()

    @staticmethod
    def arguments(draw):
        size, classes = draw(st.integers(1, 40)), draw(st.integers(1, 12))
        x = tensor_of(draw, (size, classes), draw(st.sampled_from(FLOATS)))
        labels = tensor_of(draw, (size,), torch.int64, 0, classes)
        smoothing, scale = draw(st.sampled_from((0, 0.2, 1.0))), draw(st.sampled_from((1, 0.125, -0.3)))
        return dict(x=x, labels=labels, label_smoothing=smoothing, scale=scale)

    @staticmethod
    def ours(given):
        return dict(zip(("loss", "correct", "dx"), cross_entropy(**given)))

    @staticmethod
    def plain(given, dtype):
        """Return the results; the logits are rounded to ``dtype``, that of x."""
        x, labels, scale = given["x"].detach().to(dtype), given["labels"], given["scale"]
        logits = (x * scale).double().requires_grad_()
        smoothing = given["label_smoothing"]
        loss = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        results = dict(loss=loss.detach(), correct=logits.argmax(dim=1) == labels, dx=gradient * scale)
        return results, dict(loss=float(logits.detach().nan_to_num(0, 0, 0).abs().max()), dx=abs(scale))


class Augment:
    """``augment``."""

    operator = staticmethod(augment)
    changes = ()

    @staticmethod
    def arguments(draw):
        n, size, channels = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
        batch, stepped = draw(st.integers(1, 4)), draw(st.booleans())
        given = dict(
            images=tensor_of(draw, (n, size, size, channels), torch.uint8, 0, 256),
            table=tensor_of(draw, (channels, 256), draw(st.sampled_from(FLOATS))),
            labels=tensor_of(draw, (n,), torch.int64, 0, 10) if draw(st.booleans()) else None,
            out_channels=draw(st.sampled_from((None, channels, 8))),
            padding=draw(st.integers(0, size - 1)),
            cutout_size=draw(st.integers(0, size)),
            both_sides=draw(st.booleans()),
        )
        ends = (n, crop_offsets(given["padding"], given["both_sides"]) ** 2, 2, (size + 1 - given["cutout_size"]) ** 2)
        columns = 3 * batch if stepped else batch
        given["draws"] = torch.stack([tensor_of(draw, (columns,), torch.int64, 0, end) for end in ends])
        if draw(st.booleans()):  # rows that lie apart, as in a slice of an epoch
            given["draws"] = torch.cat((given["draws"],) * 2, dim=1)[:, :columns]
        if stepped:
            given |= dict(step=tensor_of(draw, draw(st.sampled_from(((1,), ()))), torch.int64, 0, 3), batch_size=batch)
        return given

    @staticmethod
    def ours(given):
        batch, labels = augment(**given)
        return dict(batch=batch.detach()) | ({} if labels is None else dict(labels=labels))

    @staticmethod
    def plain(given):
        given, labels = dict(given), given["labels"]
        step, size, draws = given.pop("step", None), given.pop("batch_size", None), given["draws"]
        if step is not None:
            draws = given["draws"] = draws[:, int(step) * size : (int(step) + 1) * size]
            assert draws.shape[1] == size
        given["out_channels"] = given["out_channels"] or given["images"].shape[3]
        del given["labels"]
        results = dict(batch=augment_reference(**given).detach())
        return results | ({} if labels is None else dict(labels=labels[draws[0]])), None


class Record:
    """``record``; the tensors of the state count as arguments."""

    changes = ("losses", "state_correct", "lr", "global_step", "epoch_step")
    fields = ("losses", "state_correct", "schedule", "lr", "global_step", "epoch_step")

    @staticmethod
    def operator(loss, correct, state):
        return record(loss, correct, state)

    @classmethod
    def arguments(cls, draw):
        size, steps, groups = draw(st.integers(0, 300)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        rows, dtype = draw(st.integers(1, 9)), draw(st.sampled_from(FLOATS))
        state = StepState.initial(tensor_of(draw, (rows, groups), torch.float32), steps, size, dtype)
        given = dict(zip(cls.fields, state))
        given["global_step"] += draw(st.integers(0, rows + 1))
        given["epoch_step"] += draw(st.integers(0, steps - 1))
        loss = tensor_of(draw, (size,), dtype)
        return given | dict(loss=loss, correct=loss > 0)

    @classmethod
    def state(cls, given):
        return StepState(*(given[name] for name in cls.fields))

    @classmethod
    def ours(cls, given):
        return record(given["loss"], given["correct"], cls.state(given)) or {}

    @classmethod
    def plain(cls, given):
        with torch.no_grad():
            return record_reference(given["loss"], given["correct"], cls.state(given)) or {}, None


OPERATORS = {"batch_norm_act": Norm, "augment": Augment, "cross_entropy": CrossEntropy, "record": Record}


def wider(value):
    """Return a copy of an argument for plain torch, in float64."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().resolve_neg().clone()
    return (copy.double() if copy.is_floating_point() else copy).requires_grad_(value.requires_grad)


def check_call(draw, operator):
    """Make a call of ``operator``, one of :data:`OPERATORS`. Return "right", "refused" or "not compared"."""
    case = OPERATORS[operator]
    given = case.arguments(draw)
    shift = draw(st.sampled_from((0, 0, 1, 2, 4)))
    placed = {name: Placed(value, shift) for name, value in tensors(given) if dense(value)}
    given |= {name: each.tensor for name, each in placed.items()}
    for name in draw(st.lists(st.sampled_from(sorted(given)), max_size=3)):
        others = [value for value in given.values() if isinstance(value, torch.Tensor)]
        given[name] = spoil(draw, given[name], others)
    everywhere_meta = draw(st.integers(0, 19)) == 0
    if everywhere_meta:
        given = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    exact = operator in ("augment", "record")  # they copy values, so the bits must be equal
    before = {name: copy_of(value) if exact else wider(value) for name, value in given.items()}
    kept = {name: copy_of(value) for name, value in given.items()}
    try:
        results = case.ours(given)
    except ERRORS as error:
        text = str(error)
        names = (*inspect.signature(case.operator).parameters, *given, *TORCHS)
        words = "|".join(map(re.escape, names))
        assert re.search(rf"\b({words})\b", text), f"{type(error).__name__} names no argument: {text}"
        assert "\n" not in text, text
        for name, value in tensors(given):
            assert same(value, kept[name]), f"{name} has changed, although the call was refused: {text}"
        return "refused"
    finally:
        for name, each in placed.items():
            assert each.intact(), f"bytes around {name} have changed"
    if any(value.device.type == "meta" for _, value in tensors(given)):
        assert all(value.device.type == "meta" for _, value in tensors(given)), "tensors on different devices"
        assert all(result.device.type == "meta" for result in results.values())
        return "right"
    vectors = [given[name] for name in ("weight", "bias", "running_mean", "running_var") if name in given]
    if any(vector.isinf().any() for vector in vectors if vector is not None):
        return "not compared"  # torch computes x * scale - mean * scale, which is then infinity minus infinity
    arguments = (before, given["x"].dtype) if operator == "cross_entropy" else (before,)
    truth, scales = case.plain(*arguments)
    for name in case.changes:
        if isinstance(given[name], torch.Tensor):
            results[name], truth[name] = given[name].detach(), before[name].detach()
    for name, value in tensors(given):
        assert name in case.changes or same(value, kept[name]), f"{name} has changed"
    assert results.keys() == truth.keys()
    for name, result in results.items():
        compare(name, result, truth[name], None if exact else scales.get(name, 0))
    return "right"


def tensors(given):
    return [(name, value) for name, value in given.items() if isinstance(value, torch.Tensor)]


def copy_of(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def same(value, copy):
    """Return whether two tensors are equal, where NaN equals itself."""
    if value.device.type == "meta" or value.layout != torch.strided:
        return True
    return value.shape == copy.shape and bool(((value == copy) | (value.isnan() & copy.isnan())).all())


def compare(name, result, truth, scale):
    """Raise an AssertionError unless ``result`` is ``truth``: exactly without a ``scale``, else for its dtype."""
    assert result.shape == truth.shape, f"{name} has the shape {result.shape} and not {truth.shape}"
    if scale is None or not result.is_floating_point():
        assert same(result, truth), f"{name} differs from plain torch"
        return
    truth = truth.to(result.dtype).double()
    finite = truth[truth.isfinite()].abs()
    scale = max(1.0, scale, float(finite.max()) if len(finite) else 0)
    torch.testing.assert_close(
        result.double(),
        truth,
        rtol=0,
        atol=TOLERANCE[result.dtype] * scale,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def run(operator, calls):
    """Make ``calls`` calls, the same ones each time. Return how many were right, refused and not compared."""
    counts = collections.Counter()

    @settings(
        max_examples=calls,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate],  # shrinking a failure takes minutes
    )
    @given(st.data())
    def check(data):
        counts[check_call(lambda strategy: data.draw(strategy), operator)] += 1

    check()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000, help="calls of each operator (default: 2000)")
    for operator in OPERATORS:
        start = time.perf_counter()
        counts = run(operator, parser.parse_args().calls)
        seconds = time.perf_counter() - start
        shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        print(f"{operator}: {shown}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
