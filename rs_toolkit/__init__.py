"""Certified robustness by randomized smoothing. `import rs_toolkit` is quick: each module is imported when it is asked for."""

__version__ = "0.1.0"

from importlib import import_module
from pkgutil import iter_modules


def lazily(package, path):
    "`__getattr__` and `__dir__` of a package whose modules are attributes from the start (PEP 562)."
    modules = sorted(module.name for module in iter_modules(path) if not module.name.startswith('_'))

    def find(name):
        if name in modules: return import_module(f'{package}.{name}')
        raise AttributeError(f'module {package!r} has no attribute {name!r}; its modules: {", ".join(modules)}')

    return find, lambda: modules


__getattr__, __dir__ = lazily(__name__, __path__)
