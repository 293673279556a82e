# SPDX-License-Identifier: Apache-2.0
"""`python -m dsv4` is the command `dsv4`."""

import sys

from dsv4.cli import main

if __name__ == "__main__":
    sys.exit(main())
