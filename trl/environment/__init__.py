"""Text environments: a model that talks with tools."""

from trl.import_utils import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "trl.environment.base_environment": ["TextEnvironment", "TextHistory"],
        "trl.environment.chat_environment": ["ChatEnvironment"],
        "trl.environment.call_formats": ["JsonCalls"],
    },
)
