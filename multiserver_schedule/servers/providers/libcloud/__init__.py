"""Machines of any cloud that apache-libcloud has a driver for (the extra ``cloud``)."""

from __future__ import annotations

from .provider import LibcloudProvider

__all__ = ["LibcloudProvider"]
