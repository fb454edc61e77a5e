"""python -m pixelgen_kernels.report"""

import sys

from pixelgen_kernels.report.command import main
from pixelgen_kernels.report.compile import ToolError

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ToolError) as error:
        sys.exit(f"error: {error}")
