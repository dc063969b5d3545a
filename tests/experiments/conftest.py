"""Makes the experiments importable, as they are from the repository's root, and the example's modules with them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
