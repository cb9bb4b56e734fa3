"""The modules of a package folder by name: a file put there is found, none is imported unasked."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .errors import ConfigError, unknown


def module_names(package: str) -> tuple[str, ...]:
    """List the modules in a package's folder, sorted, without importing any of them.

    Names that start with an underscore are left out. The parents of the package are imported.
    Raises: ConfigError if there is no such package.
    """
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(f"{package!r} is not a package: there is no folder to look for modules.")
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def load_module(package: str, name: str, *, kind: str = "module") -> ModuleType:
    """Import one module of a package by name; its siblings stay as they are.

    kind: what such a module is to a user, for the message ("engine", "base").
    Raises: ConfigError with the nearest name if there is no such module.
    """
    names = module_names(package)
    if name not in names:
        raise ConfigError(unknown(kind, name, names))
    return import_module(f"{package}.{name}")
