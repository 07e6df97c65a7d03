"""PEP 517 backend: setuptools, plus torch as a build requirement only where it is really needed.

`torch` can't stand in `build-system.requires`: every isolated build would then download a second torch, gigabytes
of it, although the user's own has all that the stable ABI needs. So torch is asked for only if the library is going
to be compiled and no torch is in sight, for example in a fresh environment (which is about to get torch anyway).
"""

from __future__ import annotations

from find_torch import find_torch
from native_library import STABLE_ABI_TARGET, build_mode, find_compiler
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are


def _torch_if_needed() -> list[str]:
    mode = build_mode()
    if mode == "0" or (mode == "" and find_compiler() is None) or find_torch() is not None:
        return []
    return [f"torch>={STABLE_ABI_TARGET}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_needed()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_needed()
