"""A graphics card for machines that have none.

`card()` gives torch a device `cuda:0` whose tensors lie in ordinary memory. It computes with the processor's numbers,
and is as strict as a card: tensors of two devices do not meet, a generator belongs to its device, and what goes to
NumPy must be fetched first. So code for a card can be run, line by line, and must end with the processor's result,
bit for bit.
"""
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # now: later imports would meet the stand-in of torch.Generator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device('cuda:0')
CPU = torch.device('cpu')
MIXED = 'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!'
Generator = torch.Generator

class OnCard(torch.Tensor):
    "A tensor on the card; `held` has its numbers."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        facts = dict(device='meta', requires_grad=held.requires_grad)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, **facts)

    def __init__(self, held): self.held = held
    device = property(lambda self: CARD)
    is_meta = False
    def new_tensor(self, data): return torch.tensor(data, dtype=self.dtype, device=CARD)
    def __repr__(self): return f'OnCard({self.held})'
    def __reduce_ex__(self, protocol):                             # as `map_location='cpu'` reads it
        return self.detach().cpu().__reduce_ex__(protocol)
    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

def compute(function, args, kwargs):
    "What an operation gives, where its tensors are; raises where a card would."
    name = function._schema.name.removeprefix('aten::')
    there = [t for t in tensors_of((args, kwargs)) if isinstance(t, OnCard)]
    target = kwargs.get('device')
    if there: refuse_what_a_card_would(name, args, kwargs)
    plain = tree_map(fetch, kwargs)
    if target is not None: plain['device'] = CPU
    result = function(*tree_map(fetch, args), **plain)
    if name == 'copy_': stays = isinstance(args[0], OnCard)
    elif target is not None: stays = target.type != 'cpu'
    else: stays = bool(there)
    if not stays: return result
    known = {id(t.held): t for t in there}                         # what was changed in place is the same tensor

    def lift(thing):
        if not isinstance(thing, torch.Tensor): return thing
        return known[id(thing)] if id(thing) in known else OnCard(thing)
    return tree_map(lift, result)

def tensors_of(things): return [t for t in tree_leaves(things) if isinstance(t, torch.Tensor)]

def fetch(thing): return thing.held if isinstance(thing, OnCard) else thing

def refuse_what_a_card_would(name, args, kwargs):
    "Raise where an operation brings tensors, or a generator, of two devices together."
    if name not in ('_to_copy', 'copy_'):
        indexed = name.startswith(('index_put', '_index_put')) or name == 'index'
        strict = [args[0], *args[2:]] if indexed else (args, kwargs)     # an index may lie on the processor
        here = [t for t in tensors_of(strict) if not isinstance(t, OnCard) and t.dim()]
        if here: raise RuntimeError(f'{name}: {MIXED}')
    generator = kwargs.get('generator')
    if generator is not None and generator._cdata not in ON_CARD:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

class Machine(TorchDispatchMode):
    "Sends what is made on the card there."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

ON_CARD = set()                                                # generators of the card, by address

def generator(device='cpu'):
    made = Generator()
    if torch.device(device).type == 'cuda': ON_CARD.add(made._cdata)
    else: ON_CARD.discard(made._cdata)                             # an address may come again
    return made

@contextmanager
def card(count=1, current=0):
    "Within the block this machine has `count` cards; tensors can be put on the first."
    cuda = dict(is_available=lambda: True, is_initialized=lambda: False, _lazy_init=lambda: None,
                device_count=lambda: count, current_device=lambda: current,
                get_device_name=lambda device=None: 'Stand-in',
                set_device=mock.Mock(side_effect=_indexed), set_rng_state=mock.Mock(),
                get_rng_state=lambda device=None: torch.full((16,), 7, dtype=torch.uint8))
    stream = SimpleNamespace(is_capturing=lambda: False)
    future = torch.__future__
    with ExitStack() as stack:
        for name, value in cuda.items(): stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, 'Generator', generator))
        stack.enter_context(mock.patch.object(torch.accelerator, 'current_stream', lambda device=None: stream))
        stack.callback(future.set_swap_module_params_on_conversion, future.get_swap_module_params_on_conversion())
        future.set_swap_module_params_on_conversion(True)          # parameters stay the same objects, as on a card
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(Machine())
        yield torch.cuda

def _indexed(device):
    if torch.device(device).index is None:
        raise ValueError(f'Expected a torch.device with a specified index or an integer, but got:{device}')
