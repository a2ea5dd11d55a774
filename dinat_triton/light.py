"""Runs a command without torch and timm in memory: as a script, with a bare package in the place of the real one."""

import sys
import types
from pathlib import Path

package = types.ModuleType("dinat_triton")
package.__path__ = [str(Path(__file__).parent)]
sys.modules["dinat_triton"] = package

from dinat_triton.cli import main  # noqa: E402

sys.exit(main())
