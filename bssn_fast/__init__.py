"""Spectral normalisation of all of a model's weights at once: SN, SSN, BSN and BSSN."""

from bssn_fast import diagnostics
from bssn_fast.backends import Backend, BackendUnavailableError
from bssn_fast.functional import normalize
from bssn_fast.model import Update, Variant, apply, cached, remove, sigma, spectral_norm, summary
from bssn_fast.modules.loading import load_state_dict

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Update",
    "Variant",
    "apply",
    "cached",
    "diagnostics",
    "load_state_dict",
    "normalize",
    "remove",
    "sigma",
    "spectral_norm",
    "summary",
]

__version__ = "0.1.0"
