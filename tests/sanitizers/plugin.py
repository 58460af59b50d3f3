"""pytest plugin: an instrumented extension, named by SPARTAN_SANITIZED, in place of the installed one."""

from __future__ import annotations

import importlib.util
import os
import sys

specification = importlib.util.spec_from_file_location("spartan_kernels._native", os.environ["SPARTAN_SANITIZED"])
assert specification is not None and specification.loader is not None
extension = importlib.util.module_from_spec(specification)
specification.loader.exec_module(extension)
sys.modules["spartan_kernels._native"] = extension
