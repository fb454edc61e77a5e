"""`python -m pixelgen_fast`, also under torchrun and DeepSpeed's launcher."""

import sys

from pixelgen_fast.cli import main

sys.exit(main())
