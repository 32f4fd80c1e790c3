"""Tools for text environments. Each is a function of a string that also works alone."""

from trl.import_utils import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "trl.environment.tools.calculator": ["SimpleCalculatorTool"],
        "trl.environment.tools.python": ["PythonInterpreterTool"],
        "trl.environment.tools.sandbox": ["LocalSandbox", "Ran", "Sandbox"],
        "trl.environment.tools.search": ["DocumentSearchTool"],
    },
)
