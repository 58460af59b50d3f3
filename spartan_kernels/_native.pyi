"""What the compiled extension holds: functions over raw pointers, without types of their own."""

from typing import Any

class NotFinite(ValueError): ...

def __getattr__(name: str) -> Any: ...
