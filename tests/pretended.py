"""A pretended accelerator: tensors that say "cuda:0" and are computed on the CPU, to see on any machine what would wait or fail.

Inside `Accelerator()` there is a device "cuda". What mixes devices fails as it does on a GPU; what would make the CPU wait
for the GPU is counted in `waits`: numbers that are read, tensors that are copied to the CPU, indexing by a mask.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
waits: Counter[str] = Counter()


class Away(torch.Tensor):
    """A tensor of the accelerator; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **shape)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        packet, leaves = func.overloadpacket, tree_flatten((args, kwargs))[0]
        near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Away) and x.dim()]
        if near and packet not in (aten.copy_, aten.index):
            raise RuntimeError(f"{func}: expected all tensors on the same device, found cpu and {DEVICE}")
        home = packet == aten.copy_ and not isinstance(args[0], Away)
        masks = packet == aten.index and any(x is not None and x.dtype == torch.bool for x in args[1])
        if packet in READS or masks or home:
            waits[packet.__name__] += 1
        held, options = tree_map_only(Away, lambda x: x.held, (args, kwargs or {}))
        found = func(*held, **options)
        first = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if first is not None and first.is_write:
            return args[0]
        return tree_map_only(torch.Tensor, cls, found)


def is_cuda(x):
    return isinstance(x, torch.device | str) and str(x).startswith("cuda")


class Accelerator(TorchFunctionMode):
    """Make "cuda" a device: tensors that are made there, or moved there, are `Away`."""

    def __enter__(self):
        waits.clear()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `Module.to` makes new parameters
        return super().__enter__()

    def __exit__(self, *reason):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*reason)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        away = bool(args) and isinstance(args[0], Away)
        if func in (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__) and away:
            return DEVICE if func == torch.Tensor.device.__get__ else True
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu) and away:
            waits[func.__name__] += 1
            return func(args[0].held, *args[1:], **kwargs)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.device, torch._C._nn._parse_to) or not any(is_cuda(x) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args = [CPU if is_cuda(x) else x for x in args]
        return tree_map_only(
            torch.Tensor, Away, func(*args, **{key: CPU if is_cuda(x) else x for key, x in kwargs.items()})
        )

    def _to(self, tensor, *args, **kwargs):
        words = [*args, *kwargs.values()]
        like = [x for x in words if isinstance(x, torch.Tensor)]
        places = [x for x in words if isinstance(x, torch.device | str)] + [
            DEVICE if isinstance(x, Away) else CPU for x in like
        ]
        dtypes = [x for x in words if isinstance(x, torch.dtype)] + [x.dtype for x in like]
        if dtypes:
            tensor = torch.Tensor.type(tensor, dtypes[0]) if tensor.dtype != dtypes[0] else tensor
        there = is_cuda(places[0]) if places else isinstance(tensor, Away)
        if there == isinstance(tensor, Away):
            return tensor
        waits["to"] += not there
        return Away(tensor.detach()) if there else tensor.held


def moved(module):
    """Return the module with its parameters and buffers on the accelerator."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = Away(tensor.detach())
                    tensors[name] = (
                        torch.nn.Parameter(there, requires_grad=False) if tensors is owner._parameters else there
                    )
    return module
