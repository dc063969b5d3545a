"""Does BSSN do what its paper says? The claims, tried with this package: `make evidence`."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the example's data, networks, training and metrics are used here
