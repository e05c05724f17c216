"""The merge methods by name: the built-in ones, and those that other installed packages offer as entry points.

A file of this folder with a `METHOD` is a built-in method; it needs no line here.

A package offers a method in its pyproject.toml; the entry point's name is the method's, its object a `Method`:

    [project.entry-points."evomerge.methods"]
    part_way = "my_package.part_way:METHOD"
"""

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points

from evomerge.errors import EvomergeError, did_you_mean
from evomerge.merge.methods.method import Method
from evomerge.plugins import load_plugin

GROUP = "evomerge.methods"


class Methods(dict[str, Method]):
    """Methods by name: the built-in ones, and those of other packages once they were looked up.

    Only the lookup `METHODS[name]` of a name that is not built in reads which packages are installed, and imports the
    one that offers it.
    """

    def __missing__(self, name: str) -> Method:
        """The method that another package offers.  EvomergeError if none does, or it cannot be loaded."""
        offered = [point for point in entry_points(group=GROUP) if point.name == name]
        if not offered:
            raise EvomergeError(self.unknown(name))
        if len(packages := sorted({point.dist.name if point.dist else point.value for point in offered})) > 1:
            raise EvomergeError(f"{name!r} is in several packages: {', '.join(packages)}; uninstall all but one")
        where = f"{name!r} of the package {packages[0]}"
        method = load_plugin(offered[0], object, where, "")
        if not isinstance(method, Method) or method.name != name:
            raise EvomergeError(f"{where} is no `Method` of that name ({method!r:.60})")
        self[name] = method
        return method

    def unknown(self, name: str) -> str:
        """The message for a name that no method has: all names, and the most similar one."""
        names = sorted({*self, *entry_points(group=GROUP).names})
        return f"{name!r} is not one of {', '.join(names)}{did_you_mean(name, names)}"


def built_in(package: str, folders: Iterable[str]) -> Methods:
    """Every `Method` that a module of the package defines, in the order of the file names.

    package: its name.  folders: where its modules are, its `__path__`.
    """
    found = Methods()
    for file in pkgutil.iter_modules(folders):
        for value in vars(import_module(f"{package}.{file.name}")).values():
            if isinstance(value, Method):
                assert found.get(value.name, value) is value, f"two methods are called {value.name}"
                found[value.name] = value
    return found
