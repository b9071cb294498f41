"""Marks that skip a test where the operating system lacks what it needs, and say what that is."""
import os
import sys
import tempfile
from pathlib import Path

import pytest


def needs_linux(what):
    """Skip the test anywhere else."""
    return pytest.mark.skipif(sys.platform != 'linux', reason=f"needs Linux: {what}")


def needs_posix(what):
    """Skip the test on Windows."""
    return pytest.mark.skipif(os.name == 'nt', reason=f"needs Linux or macOS: {what}")


def can_link():
    """Whether this user may make symbolic links."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, 'link').symlink_to('target')
        except OSError:
            return False
    return True


needs_links = pytest.mark.skipif(
    not can_link(), reason="needs symbolic links, which Windows allows to administrators")


def with_slashes(text):
    """The text with the paths in it as they are written outside of Windows."""
    return text.replace('\\', '/') if os.name == 'nt' else text
