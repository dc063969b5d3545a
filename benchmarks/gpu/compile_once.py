"""Lets no two processes compile the same Triton kernel at once: the second waits, and finds it on the disk."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.gettempdir(), "bssn_fast_compiling")


def once(compile_kernel: Callable[..., Any], folder: Path = FOLDER) -> Callable[..., Any]:
    """Return `triton.compiler.compile` with a lock for each kernel, by what Triton's own cache tells kernels apart."""

    @wraps(compile_kernel)
    def compile_alone(src: Any, target: Any = None, options: dict[str, Any] | None = None, **others: Any) -> Any:
        key = f"{src.hash() if hasattr(src, 'hash') else src}-{target}-{sorted((options or {}).items(), key=str)}"
        folder.mkdir(exist_ok=True)
        with (folder / hashlib.sha256(key.encode()).hexdigest()).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed
            return compile_kernel(src, target=target, options=options, **others)

    return compile_alone


def install() -> None:
    """Do so for all kernels of this process; before the first of them is called."""
    try:
        from triton import compiler
    except ImportError:
        return
    compiler.compile = once(compiler.compile)
