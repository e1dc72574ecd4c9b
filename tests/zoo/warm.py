"""Imports that children inherit from the process that forks them. Nothing is computed, so no thread pool exists yet."""

import gc
import importlib
import logging
import pkgutil


def import_models(model_classes):
    """Import transformers and the modelling code of these classes, silently."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    for name in model_classes:
        getattr(transformers, name)
    gc.collect()
    gc.freeze()


def import_lightsft(strategies):
    """Import these strategies and the core, as it is now: files may be edited while a sweep runs."""
    import lightsft

    for name in strategies:
        lightsft.strategy(name)
    for module in pkgutil.iter_modules(lightsft.__path__):
        if not module.ispkg:
            importlib.import_module(f"lightsft.{module.name}")
