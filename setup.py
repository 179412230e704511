"""Whether the compiled kernel is built; all else is in pyproject.toml.

VSWA_BUILD_KERNEL=none      a pure-Python wheel, ``py3-none-any``
VSWA_BUILD_KERNEL=required  the build fails where the kernel cannot be compiled, as for wheels of an index
otherwise                   the kernel is built where there is a C compiler
"""

import os

from setuptools import Distribution, setup

KERNEL = os.environ.get("VSWA_BUILD_KERNEL", "")
if KERNEL not in ("", "none", "required"):
    raise SystemExit(f"VSWA_BUILD_KERNEL: expected none or required, got {KERNEL!r}")


class Chosen(Distribution):
    """The distribution that pyproject.toml describes, with the kernel or without."""

    def parse_config_files(self, *args, **options):  # type: ignore[no-untyped-def]
        super().parse_config_files(*args, **options)
        if KERNEL == "none":
            self.ext_modules = None
        elif KERNEL == "required":
            for module in self.ext_modules or ():
                module.optional = False


setup(distclass=Chosen)
