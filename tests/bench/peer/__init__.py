# SPDX-License-Identifier: Apache-2.0
"""Other engines timed beside dsv4: one module for each, run by tests/bench/peers.py."""
