# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V4 language models from their official safetensors, every internal an array away."""

__version__ = "0.1.0"
