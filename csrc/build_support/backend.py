"""PEP 517 backend: setuptools, with torch as a build requirement only where it is needed.

With torch in `build-system.requires`, every isolated build would download a second torch of several gigabytes, although
the user's own torch has everything that the stable ABI needs. So torch is only required if the library will be compiled
and no torch is found, for example in a fresh environment, which gets torch anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from find_torch import find_torch
from native_library import STABLE_ABI_TARGET, build_mode, find_compiler
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks of setuptools


def _torch_if_needed() -> list[str]:
    mode = build_mode()
    if mode == "0" or (mode == "" and find_compiler() is None) or find_torch() is not None:
        return []
    return [f"torch>={STABLE_ABI_TARGET}"]


Settings = Mapping[str, str | list[str] | None] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_needed()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_needed()]
