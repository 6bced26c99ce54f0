"""A double of a GPU, for tests on a CPU: its tensors say `cuda:0`, hold their values here, and refuse to mix.

    with GpuDouble() as gpu:                    # torch.cuda.is_available() from here on
        x = torch.zeros(3, device="cuda")       # values are computed, so that code that depends on them runs
        x + torch.zeros(3)                      # MixedDevicesError, as on a GPU
        x.sum().item()                          # counted: the host waited
    gpu.waits                                   # {"pipeline/…:function": how often}

It checks the devices of every operation, as a GPU does. It checks that tensors sent by a separate stream are not read
before the reading stream has waited for them, and are recorded there, and that only pinned memory is sent without
waiting. It cannot check kernels, their order of sums, speed or memory. It uses `torch.overrides.TorchFunctionMode` (for
calls that name a device) and a tensor subclass (for operations on one). Threads enter it by `ThreadPoolExecutor`'s
double.
"""

import contextlib
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pipeline.numerics import gptq

CUDA = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[1]
_WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")
_active: "GpuDouble | None" = None


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class UnorderedError(RuntimeError):
    """A tensor is read before its copy is known to have arrived, or its memory may be reused while it is read."""


class OnGpu(torch.Tensor):
    """A tensor of the double. For autograd it is on the CPU, and its operations reach `__torch_dispatch__`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, sent_by=None):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cpu",
        )

    def __init__(self, held, sent_by=None):
        self.held = held
        self.sent_by = sent_by  # (stream, when) of a copy that nobody has waited for here
        self.read_by = set()  # streams it is recorded in

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def record_stream(self, stream):
        self.read_by.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _active.compute(func, args, dict(kwargs or {}))


@dataclass(eq=False)
class Stream:
    device: torch.device = CUDA
    done: int = 0  # operations it was given
    seen: dict = field(default_factory=dict)  # stream -> up to where this one has waited for it

    def wait_event(self, event):
        self.seen[event.stream] = max(self.seen.get(event.stream, 0), event.done)


class Event:
    stream, done = None, 0

    def record(self, stream):
        self.stream, self.done = stream, stream.done


class GpuDouble(TorchFunctionMode):
    """The double. Attributes: `waits`, where in pipeline/ the host waited for the GPU and how often; `uploads`, where
    tensors were sent, by whether the host waited; `free` bytes of its memory."""

    def __init__(self, free=80 << 30):
        super().__init__()
        self.waits, self.uploads = Counter(), Counter()
        self.free = free
        self.main = Stream()
        self._here = threading.local()
        self._pinned = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        global _active
        if _active is None:  # threads come in later
            _active = self
            double = self

            class Pool(ThreadPoolExecutor):
                def submit(self, function, /, *args, **kwargs) -> Future:
                    def inside():
                        with double:
                            return function(*args, **kwargs)

                    return super().submit(inside)

            names = {
                "is_available": lambda: True,
                "device_count": lambda: 1,
                "set_device": lambda device: None,
                "mem_get_info": lambda device=None: (self.free, self.free),
                "Stream": lambda device=None: Stream(),
                "Event": Event,
                "stream": self._use,
                "current_stream": lambda device=None: self.current,
            }
            for name, function in names.items():
                self._patches.enter_context(mock.patch.object(torch.cuda, name, function))
            self._patches.enter_context(mock.patch("pipeline.blocks.prefetch.ThreadPoolExecutor", Pool))
            self._patches.enter_context(mock.patch("pipeline.numerics.gptq.record_launches", self._record))
            gptq._record_rounding.cache_clear()  # of another double, or of a GPU
            self._patches.callback(gptq._record_rounding.cache_clear)
            before = torch.__future__.get_overwrite_module_params_on_conversion()
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        return super().__enter__()

    def __exit__(self, *error):
        global _active
        if threading.current_thread() is threading.main_thread():
            self._patches.close()
            _active = None
        return super().__exit__(*error)

    def _record(self, run, device):
        """Replace `record_launches`, and check that recorded launches do not wait."""

        def replay():
            before = self.waits.total()
            run()
            assert self.waits.total() == before, "a graph that waits for the GPU cannot be recorded"

        return replay

    # --- Streams ---

    @property
    def current(self):
        return getattr(self._here, "stream", self.main)

    @contextlib.contextmanager
    def _use(self, stream):
        before, self._here.stream = self.current, stream
        try:
            yield
        finally:
            self._here.stream = before

    # --- What asks for a device ---

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._move(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self._pinned[pinned.data_ptr()] = pinned
            return pinned
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], OnGpu):
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            self._note_wait()
            return args[0].held.tolist()
        if name == "__set__" and isinstance(args[1], OnGpu) != isinstance(args[0], OnGpu):
            raise AssertionError("the double cannot change the device of a tensor in place")
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"])
            kwargs["device"] = torch.device("cpu") if wanted.type == "cuda" else wanted
            made = func(*args, **kwargs)
            return tree_map(lambda t: _wrap(t), made) if wanted.type == "cuda" else made
        return func(*args, **kwargs)

    def _move(self, func, args, kwargs):
        tensor, rest = args[0], list(args[1:])
        target = {torch.Tensor.cpu: torch.device("cpu"), torch.Tensor.cuda: CUDA}.get(func, kwargs.pop("device", None))
        if rest and isinstance(rest[0], torch.Tensor):
            target, rest = rest[0].device, [rest[0].dtype, *rest[1:]]
        elif rest and isinstance(rest[0], str | torch.device):
            target = rest.pop(0)
        elif rest and rest[0] is None:  # as modules call it that are cast and stay where they are
            rest.pop(0)
        waits = not (kwargs.pop("non_blocking", False) or (len(rest) > 1 and rest.pop(1)))
        there = isinstance(tensor, OnGpu)
        kind = tensor.device.type if target is None else torch.device(target).type
        if kind == "cuda" and not there:
            tensor = self._send(tensor, waits)
        elif kind == "cpu" and there:
            self._note_wait()
            tensor = _Download.apply(tensor)
        kwargs = {name: value for name, value in kwargs.items() if name in ("dtype", "copy")}
        return tensor.to(*rest, **kwargs) if rest or kwargs else tensor

    def _send(self, tensor, waits):
        self.uploads[f"{'waiting' if waits else 'meanwhile'} {_place()}"] += 1
        if waits:
            return _Upload.apply(tensor)
        if tensor.data_ptr() not in self._pinned:
            raise UnorderedError(f"memory that is not pinned is sent without waiting, {_place()}")
        stream = self.current
        stream.done += 1
        return OnGpu(tensor.detach().clone(), None if stream is self.main else (stream, stream.done))

    # --- What is done on one ---

    def compute(self, func, args, kwargs):
        flat = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = str(func).rpartition(".")[0]
        for tensor in flat:
            if isinstance(tensor, OnGpu):
                self._check_order(tensor)
        indexed = name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")
        moving = name in ("aten.copy_", "aten._to_copy")
        for tensor in flat:
            if not isinstance(tensor, OnGpu) and tensor.dim() > 0 and not moving and tensor.numel():
                if not indexed or tensor is flat[0]:
                    raise MixedDevicesError(f"{func} of tensors on {[str(t.device) for t in flat]}, {_place()}")
                self._note_wait()  # indices on the host are sent
        if name in _WAITS or (moving and len({type(t) for t in flat}) > 1):
            self._note_wait()
        if indexed and any(t.dtype == torch.bool for t in flat[1:]):
            self._note_wait()  # how many there are
        known = {id(t.held): t for t in flat if isinstance(t, OnGpu)}
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if name == "aten.copy_" and not isinstance(args[0], OnGpu):
            return args[0]
        sent = {t.held.untyped_storage().data_ptr(): t for t in flat if isinstance(t, OnGpu) and t.sent_by}

        def wrap(value):
            if id(value) in known:
                return known[id(value)]
            made = _wrap(value)
            if isinstance(made, OnGpu) and (source := sent.get(made.held.untyped_storage().data_ptr())) is not None:
                made.sent_by, made.read_by = source.sent_by, source.read_by
            return made

        return tree_map(wrap, out)

    def _check_order(self, tensor):
        if tensor.sent_by is None or tensor.sent_by[0] is self.current:
            return
        stream, when = tensor.sent_by
        if self.current.seen.get(stream, 0) < when:
            raise UnorderedError(f"a tensor is read before its copy has arrived, {_place()}")
        if self.current not in tensor.read_by:
            raise UnorderedError(f"a tensor of another stream is read and not recorded, {_place()}")

    def _note_wait(self):
        self.waits[_place()] += 1


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(ctx, upstream):
        return upstream.held


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.held.detach().clone()

    @staticmethod
    def backward(ctx, upstream):
        return OnGpu(upstream)


def _wrap(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _unwrap(value):
    return value.held if isinstance(value, OnGpu) else value


def _place():
    """Return the innermost running function of the project."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT / "pipeline"):
            return f"{path.relative_to(_ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
