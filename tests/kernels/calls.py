# SPDX-License-Identifier: Apache-2.0
"""`dsv4.kernel_calls` under the name the kernel tests use."""

from dsv4.kernel_calls import *  # noqa: F403
