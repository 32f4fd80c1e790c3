"""Best-of-n sampling."""

from trl.import_utils import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {"trl.extras.best_of_n_sampler": ["BestOfNSampler"]})
