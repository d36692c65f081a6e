"""On the path of ``tox -e slow-paths``: every application has its fast paths switched off, in the
tests and in the servers that they start, but for what a test sets itself."""

import importlib.util
import sys
from typing import Any

SETTINGS = "flask_websockets.config"


class SwitchedOff:
    """Finds the module of the settings, and has it read one more."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != SETTINGS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec: Any = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_switch_off(module: Any) -> None:
            load(module)
            read = module.Config.from_mapping.__func__
            module.Config.from_mapping = classmethod(
                lambda cls, mapping: read(cls, {"WEBSOCKETS_FAST_PATHS": False, **mapping})
            )

        spec.loader.exec_module = load_and_switch_off
        return spec


sys.meta_path.insert(0, SwitchedOff())  # type: ignore[arg-type]
